//! Products of many rows by kernels of our own (`product_sm90.cu`, `product_gated_sm90.cu`), where they keep a Hopper GPU busier than
//! cuBLASLt's.

mod share;

pub(crate) use share::Share;
use share::{Cluster, Crew};

use super::{
    context::CudaDevice,
    launch::{Arg, Grid, TensorMap, suffix},
    matmul::{Gemm, Matrix},
    widen::WidenBeside,
};
use crate::{DType, Result};

/// Rows of a box of B [k, n] and of C.
const BOX: u32 = 64;
/// Columns of the boxes that a gated product leaves.
const NARROW: u32 = 32;
/// `PRODUCT_BYTES`.
const SHARED: u32 = 4 * 49_152 + 4 * 8192 + 8 * 8 + 2 * 8;
/// The share of the tiles' places that must be filled, in eighths: else the library's choice of smaller tiles takes less time.
const FILLED: usize = 7;

/// A gated unit around a product: its kernels' name for the activation, and how its matrices [m, f] lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatedUnit {
    pub(crate) activation: &'static str,
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
}

impl CudaDevice {
    /// Whether a product is served; else it is left to cuBLASLt.
    pub(crate) fn serves_gemm(self, gemm: &Gemm) -> bool {
        let &Gemm { m, n, a, b, c, ldc, input, .. } = gemm;
        let result = Matrix { address: c, ld: ldc, transposed: false };
        let plain = gemm.alpha == 1.0 && !gemm.accumulate && gemm.bias.is_none() && !a.transposed && gemm.output == input;
        plain && self.serves_product([m, n], input) && [a, b, result].iter().all(is_aligned)
    }

    /// C = A B, or A Bᵀ, of a product that is served.
    pub(crate) fn product(self, gemm: &Gemm, ahead: &WidenBeside) -> Result<()> {
        let &Gemm { m, n, k, a, b, c, ldc, input, .. } = gemm;
        let result = Matrix { address: c, ld: ldc, transposed: false };
        let (turned, b_sizes) = if b.transposed { ("", [n, k]) } else { ("turned_", [k, n]) };
        let suffix = suffix("product", input)?;
        let maps = |cluster: Cluster| {
            let b_rows = if b.transposed { cluster.w_rows() } else { BOX };
            let maps = [
                TensorMap::rows(self, result, [m, n], input, BOX)?,
                TensorMap::rows(self, a, [m, k], input, cluster.x_rows())?,
                TensorMap::rows(self, b, b_sizes, input, b_rows)?,
            ];
            Ok(maps.map(Arg::Map).to_vec())
        };
        let name = |kind: &str| format!("product_{turned}{kind}sm90_{suffix}");
        self.launch_product([m, n], name, maps, &[Arg::size(k)], ahead)
    }

    /// [gate | up] = A Bᵀ, B [2 f, k] with gate's rows before up's, and y = act(gate) up, for k columns.
    ///
    /// The caller has asked [`Self::serves_product`] for [m, 2 f]; f is a multiple of 8, and all is aligned.
    pub(crate) fn gated_product(
        self,
        [a, b]: [Matrix; 2],
        [m, f, k]: [usize; 3],
        unit: GatedUnit,
        y: Matrix,
        dtype: DType,
        ahead: &WidenBeside,
    ) -> Result<()> {
        let left = |matrix| TensorMap::boxes(self, matrix, [m, f], dtype, [NARROW, BOX]);
        let (suffix, activation) = (suffix("gated product", dtype)?, unit.activation);
        let maps = |cluster: Cluster| {
            let maps = [
                left(unit.gate)?,
                left(unit.up)?,
                left(y)?,
                TensorMap::rows(self, a, [m, k], dtype, cluster.x_rows())?,
                TensorMap::paired(self, b, [f, k], dtype, cluster.w_rows())?,
            ];
            Ok(maps.map(Arg::Map).to_vec())
        };
        let name = |kind: &str| format!("product_gated_{kind}sm90_{suffix}_{activation}");
        self.launch_product([m, 2 * f], name, maps, &[Arg::size(k)], ahead)
    }

    /// With dy = A B [m, f], which is not written: the gradients of gate and up, which may lie over those, and act(gate) up to `y`.
    ///
    /// The caller has asked [`Self::serves_product`] for [m, f], and all is aligned.
    pub(crate) fn gated_gradients(
        self,
        [a, b]: [Matrix; 2],
        [m, f, k]: [usize; 3],
        unit: GatedUnit,
        gradients: [Matrix; 2],
        y: Option<Matrix>,
        dtype: DType,
        ahead: &WidenBeside,
    ) -> Result<()> {
        let boxes = |matrix, sizes, rows| TensorMap::rows(self, matrix, sizes, dtype, rows);
        let (suffix, activation) = (suffix("gated gradients", dtype)?, unit.activation);
        let maps = |cluster: Cluster| {
            let maps = [
                boxes(gradients[0], [m, f], BOX)?,
                boxes(gradients[1], [m, f], BOX)?,
                boxes(y.unwrap_or(unit.gate), [m, f], BOX)?,
                boxes(unit.gate, [m, f], BOX)?,
                boxes(unit.up, [m, f], BOX)?,
                boxes(a, [m, k], cluster.x_rows())?,
                boxes(b, [k, f], BOX)?,
            ];
            Ok(maps.map(Arg::Map).to_vec())
        };
        let name = |kind: &str| format!("product_gated_bwd_{kind}sm90_{suffix}_{activation}");
        self.launch_product([m, f], name, maps, &[Arg::size(k), Arg::U32(y.is_some().into())], ahead)
    }

    /// A result [m, n]: by one launch, or by two beside each other. `name`: with a cluster's part of it; `more`: what comes after the
    /// share.
    fn launch_product(
        self,
        result: [usize; 2],
        name: impl Fn(&str) -> String,
        maps: impl Fn(Cluster) -> Result<Vec<Arg>>,
        more: &[Arg],
        ahead: &WidenBeside,
    ) -> Result<()> {
        let args = |cluster, share, ahead: &WidenBeside| -> Result<Vec<Arg>> {
            let beside = [Arg::Pointer(ahead.out), Arg::Widen(ahead.widen)];
            Ok([&maps(cluster)?[..], &[Arg::Share(share)], more, &beside].concat())
        };
        let grid = |cluster: Cluster, clusters: usize| Grid { shared: SHARED, ..Grid::new(cluster.blocks() * clusters, 384) };
        let (two, eight) = (name(""), name("oct_"));
        let crew = self.crew(&eight, grid(Cluster::Eight, 1));
        let Some(shares) = Share::out(result, crew) else {
            let clusters = crew.twos.min(Cluster::Two.tiles(result));
            return self.launch_early(&two, grid(Cluster::Two, clusters), &args(Cluster::Two, Share::all(result), ahead)?);
        };
        let meeting = self.zeros("launches that meet", 8)?;
        let [first, rest] = shares.map(|share| share.meeting_at(meeting));
        let (first, rest) = (args(Cluster::Eight, first, ahead)?, args(Cluster::Two, rest, &WidenBeside::default())?);
        let launched = self
            .launch_beside([(&eight, grid(Cluster::Eight, crew.eights), &first), (&two, grid(Cluster::Two, crew.beside), &rest)]);
        if launched.is_err() {
            // The first may have been launched, and told a second that is not there.
            self.fill(meeting, 0, 8)?;
        }
        launched
    }

    /// The clusters of a product; `eight` and `grid`: a kernel of clusters of eight. None of eight where the driver does not tell how many,
    /// or cannot have launches meet.
    fn crew(self, eight: &str, grid: Grid) -> Crew {
        // Of a device that only counts, about as many as of one that runs.
        let counted = self.info().multiprocessors / Cluster::Eight.blocks();
        let ask = || if self.is_dry() { counted.saturating_sub(1) } else { self.clusters_at_once(eight, grid).unwrap_or(0) };
        let eights = *self.gpu().eights.get_or_init(|| if self.can_overlap() { ask() } else { 0 });
        let twos = self.clusters();
        Crew { twos, eights, beside: twos.saturating_sub(eights * Cluster::Eight.blocks() / Cluster::Two.blocks()) }
    }

    fn clusters(self) -> usize {
        self.info().multiprocessors / 2
    }

    /// Whether the kernels serve a result [m, n] of a type: its tiles fill the device in all rounds but for a little, and are full
    /// themselves.
    pub(crate) fn serves_product(self, [m, n]: [usize; 2], dtype: DType) -> bool {
        let capability = self.info().capability;
        let clusters = self.clusters().max(1);
        let rounds = Cluster::Two.tiles([m, n]).div_ceil(clusters);
        (capability.major, capability.minor) == (9, 0)
            && matches!(dtype, DType::Bf16 | DType::F16)
            && rounds > 0
            && 8 * m * n >= FILLED * rounds * clusters * Cluster::Two.tile().iter().product::<usize>()
    }
}

/// Whether the copy engine can read and write a matrix.
pub(crate) fn is_aligned(matrix: &Matrix) -> bool {
    matrix.address.is_multiple_of(16) && matrix.ld.is_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{ComputeCapability, DeviceInfo};

    /// A device that only counts checks each launch's arguments against the kernel's, by both kinds of clusters.
    #[test]
    fn launches_of_products_are_as_their_kernels_have_it() {
        let (name, driver, capability) = ("a GPU with products".to_owned(), 13_000, ComputeCapability::HOPPER);
        let info = DeviceInfo { ordinal: 0, name, capability, memory: 1 << 40, multiprocessors: 132, driver };
        let device = CudaDevice::dry(&info);
        let matrix = |ld, transposed| Matrix { address: 1 << 20, ld, transposed };
        let ahead = WidenBeside::default();
        // Shared out by tokens, by columns, and not.
        for ([m, f], dtype) in [[2800, 1352], [3064, 2568], [1024, 4096]].into_iter().zip([DType::Bf16, DType::F16, DType::Bf16])
        {
            assert!(device.serves_product([m, f], dtype), "{m} x {f}");
            for transposed in [false, true] {
                let (a, b) = (matrix(136, false), matrix(if transposed { 136 } else { f }, transposed));
                let sums = Gemm {
                    m,
                    n: f,
                    k: 136,
                    a,
                    b,
                    c: 1 << 20,
                    ldc: f,
                    alpha: 1.0,
                    accumulate: false,
                    bias: None,
                    input: dtype,
                    output: dtype,
                };
                assert!(device.serves_gemm(&sums));
                device.product(&sums, &ahead).unwrap();
            }
            let rows = matrix(f, false);
            for activation in ["silu", "gelu_tanh"] {
                let unit = GatedUnit { activation, gate: rows, up: rows };
                let (x, w) = (matrix(136, false), matrix(136, true));
                device.gated_product([x, w], [m, f, 136], unit, rows, dtype, &ahead).unwrap();
                for y in [None, Some(rows)] {
                    device.gated_gradients([x, rows], [m, f, 136], unit, [rows, rows], y, dtype, &ahead).unwrap();
                }
            }
        }
        let crew = device.crew("product_oct_sm90_bf16", Grid::new(8, 384));
        assert_eq!((crew.twos, crew.eights, crew.beside), (66, 15, 6));
    }
}
