//! W₀ + s B A.

use nibble_autograd::ParamStore;
use nibble_tensor::Result;

use crate::{Adapter, Linear};

/// Adds a layer's update to `weight` (row-major [out, in], f32): W += s B A. Returns the norm of the update relative to the
/// weight's, ‖s B A‖ / ‖W‖ (0 without an adapter).
///
/// # Errors
/// When the adapter's parameters are not of this store.
pub fn merge(linear: &Linear, params: &ParamStore, weight: &mut [f32]) -> Result<f64> {
    let Some(Adapter::Lora(lora)) = &linear.adapter else { return Ok(0.0) };
    let (a, b) = (params.get(&lora.a)?, params.get(&lora.b)?);
    let (a, b) = (a.to_vec::<f32>()?, b.to_vec::<f32>()?);
    let (_, inputs) = linear.sizes();
    let rank = lora.a.shape.dims()[0];
    let (mut update, mut total) = (0.0f64, 0.0f64);
    let mut delta = vec![0.0f32; inputs];
    for (row, b) in weight.chunks_exact_mut(inputs).zip(b.chunks_exact(rank)) {
        delta.fill(0.0);
        for (&b, a) in b.iter().zip(a.chunks_exact(inputs)) {
            for (d, &a) in delta.iter_mut().zip(a) {
                *d += b * a;
            }
        }
        for (w, &d) in row.iter_mut().zip(&delta) {
            let d = lora.scale * d;
            update += f64::from(d).powi(2);
            total += f64::from(*w).powi(2);
            *w += d;
        }
    }
    Ok(if total > 0.0 { (update / total).sqrt() } else { 0.0 })
}
