//! Bit for bit what bitsandbytes 0.50.2 computed on CUDA: a subset of the reference file always, all of it where `NIBBLE_GOLDEN` names its folder.

use half::{bf16, f16};
use nibble_nf4::{
    Absmax, DynamicMap, Element, FP4, Format, NF4, QuantConfig, QuantizedBlocks, dequantize, dequantize_dynamic,
    dynamic_map_signed, dynamic_map_unsigned, int8, int8::Int8Rows, quantize, quantize_dynamic,
};
use nibble_testkit::golden_folder;
use safetensors::{Dtype, SafeTensors};

const SUBSET: &[u8] = include_bytes!("data/quant.safetensors");

/// Runs `check` on the subset, and on the whole file if it is there.
fn each_file(check: impl Fn(&Golden<'_>)) {
    check(&Golden(SafeTensors::deserialize(SUBSET).unwrap()));
    if let Some(folder) = golden_folder() {
        let bytes = std::fs::read(folder.join("quant.safetensors")).expect("the whole file");
        check(&Golden(SafeTensors::deserialize(&bytes).unwrap()));
    }
}

struct Golden<'a>(SafeTensors<'a>);

impl Golden<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.tensor(name).is_ok()
    }

    fn get<T: bytemuck::Pod>(&self, name: &str) -> Vec<T> {
        bytemuck::pod_collect_to_vec(self.0.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data())
    }

    /// Names of 4-bit results, less their last part: `<case>.<format>.<block size>[.nested]`.
    fn four_bit_cases(&self) -> Vec<String> {
        let mut cases: Vec<String> = self
            .0
            .names()
            .into_iter()
            .filter_map(|name| name.strip_suffix(".packed").filter(|p| !p.ends_with("dyn8")))
            .map(str::to_owned)
            .collect();
        cases.sort();
        assert!(cases.len() >= 20);
        cases
    }
}

/// Equal bits, or the first index at which they are not.
#[track_caller]
fn assert_bits<T: Element>(what: &str, ours: &[T], theirs: &[T]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let bits = |x: &T| x.to_f32().to_bits();
    if let Some(i) = (0..ours.len()).find(|&i| bits(&ours[i]) != bits(&theirs[i])) {
        panic!("{what}[{i}]: expected {:?}, found {:?}", theirs[i].to_f32(), ours[i].to_f32());
    }
}

#[test]
fn four_bit_tables_are_the_reference_ones() {
    each_file(|golden| {
        assert_bits("nf4", &NF4, &golden.get("code.nf4"));
        // Code 8 decodes to -0 there too; only the table that it writes to files has +0.
        assert_bits("fp4", &FP4.map(|level| level + 0.0), &golden.get("code.fp4"));
    });
}

#[test]
fn dynamic_maps_are_the_reference_ones() {
    each_file(|golden| {
        assert_bits("signed", dynamic_map_signed(), &golden.get("code.dynamic_signed"));
        assert_bits("unsigned", dynamic_map_unsigned(), &golden.get("code.dynamic_unsigned"));
    });
}

#[test]
fn four_bit_codes_scales_and_values_are_the_reference_ones() {
    each_file(|golden| {
        for case in golden.four_bit_cases() {
            let input = format!("{}.input", case.split('.').next().unwrap());
            match golden.0.tensor(&input).unwrap().dtype() {
                Dtype::F32 => check_four_bit::<f32>(golden, &case, &input),
                Dtype::BF16 => check_four_bit::<bf16>(golden, &case, &input),
                Dtype::F16 => check_four_bit::<f16>(golden, &case, &input),
                other => panic!("{input}: {other:?}"),
            }
        }
    });
}

fn check_four_bit<T: Element + bytemuck::Pod>(golden: &Golden<'_>, case: &str, input: &str) {
    let part = |name: &str| format!("{case}.{name}");
    let mut fields = case.split('.').skip(1);
    let format = if fields.next() == Some("nf4") { Format::Nf4 } else { Format::Fp4 };
    let block_size = fields.next().unwrap().parse().unwrap();
    let config = QuantConfig { format, block_size, double_quant: fields.next().is_some() };

    let q = quantize(&golden.get::<T>(input), &config).unwrap();
    match q.absmax() {
        Absmax::Plain(absmax) => assert_bits(&part("absmax"), absmax, &golden.get(&part("absmax"))),
        Absmax::Nested { codes, absmax, offset, .. } => {
            assert_bits(&part("offset"), &[*offset], &golden.get(&part("offset")));
            assert_bits(&part("nested_absmax"), absmax, &golden.get(&part("nested_absmax")));
            assert_eq!(codes, &golden.get::<u8>(&part("absmax")), "{case}");
        }
    }
    let theirs = golden.get::<u8>(&part("packed"));
    assert_eq!(q.packed().len(), theirs.len());
    let differing: Vec<usize> = (0..theirs.len()).filter(|&i| q.packed()[i] != theirs[i]).collect();
    for &i in &differing {
        let found = q.packed()[i];
        assert!(
            format == Format::Fp4 && is_tie(&golden.get::<T>(input), block_size, 2 * i),
            "{case}.packed[{i}]: expected {:02x}, found {found:02x}",
            theirs[i]
        );
    }
    assert!(differing.len() <= 1 + theirs.len() / 4096, "{case}: {} ties", differing.len());
    if golden.has(&part("dequant")) {
        let (config, len, _, absmax) = q.into_parts();
        let q = QuantizedBlocks::from_parts(config.format, config.block_size, len, theirs, absmax).unwrap();
        let mut out = vec![T::from_f32(7.0); q.len()];
        dequantize(&q, &mut out).unwrap();
        assert_bits(&part("dequant"), &out, &golden.get(&part("dequant")));
    }
}

/// Whether either element of a byte lies within a relative 2^-22 of an FP4 threshold.
///
/// The reference's GPU approximates 1 / absmax to one unit in the last place, where ours is correctly rounded. FP4's
/// thresholds are simple fractions, which 16-bit inputs do hit exactly: such a tie may fall either way.
fn is_tie<T: Element>(x: &[T], block_size: usize, at: usize) -> bool {
    let block = &x[at / block_size * block_size..];
    let absmax = block.iter().take(block_size).map(|v| f64::from(v.to_f32().abs())).fold(0.0, f64::max);
    x[at..].iter().take(2).any(|v| {
        let y = f64::from(v.to_f32().abs()) / absmax;
        [0.5 / 192.0, 16.5 / 192.0, 5.0 / 24.0, 7.0 / 24.0, 5.0 / 12.0, 0.583333, 5.0 / 6.0]
            .iter()
            .any(|t| (y / t - 1.0).abs() < 2f64.powi(-22))
    })
}

#[test]
fn dynamic_codes_scales_and_values_are_the_reference_ones() {
    each_file(|golden| {
        let cases: Vec<_> = golden.0.names().into_iter().filter_map(|n| n.strip_suffix(".dyn8.packed")).collect();
        assert!(cases.len() >= 5);
        for case in cases {
            let input = format!("{case}.input");
            let x: Vec<f32> = match golden.0.tensor(&input).unwrap().dtype() {
                Dtype::F32 => golden.get(&input),
                Dtype::BF16 => golden.get::<bf16>(&input).into_iter().map(bf16::to_f32).collect(),
                _ => golden.get::<f16>(&input).into_iter().map(f16::to_f32).collect(),
            };
            let q = quantize_dynamic(&x, DynamicMap::Signed, 256).unwrap();
            assert_bits(case, &q.absmax, &golden.get(&format!("{case}.dyn8.absmax")));
            assert_eq!(q.codes, golden.get::<u8>(&format!("{case}.dyn8.packed")), "{case}");
            if golden.has(&format!("{case}.dyn8.dequant")) {
                let mut out = vec![7.0f32; x.len()];
                dequantize_dynamic(&q, &mut out).unwrap();
                assert_bits(case, &out, &golden.get(&format!("{case}.dyn8.dequant")));
            }
        }
    });
}

#[test]
fn int8_rows_are_the_reference_ones() {
    each_file(|golden| {
        let rows = int8::quantize_rows(&golden.get::<f16>("int8.weight"), [96, 128]).unwrap();
        assert_bits("SCB", &rows.scb, &golden.get("int8.SCB"));
        assert_eq!(rows.cb, golden.get::<i8>("int8.CB"));
    });
}

#[test]
fn int8_matmul_with_outlier_columns_is_the_reference_one() {
    each_file(|golden| {
        let w = Int8Rows { shape: [96, 128], cb: golden.get("int8.CB"), scb: golden.get("int8.SCB") };
        let y = int8::matmul(&golden.get("int8.x"), [10, 128], &w, int8::OUTLIER_THRESHOLD).unwrap();
        assert_bits("y", &y, &golden.get::<f16>("int8.y"));
    });
}
