//! What the build reads off the sources and the compiler's log.

#![allow(dead_code, reason = "the build's own modules, which the tests use a part of")]

#[path = "../build/log.rs"]
mod log;
#[path = "../build/signatures.rs"]
mod signatures;

use log::{Declared, Log};
use signatures::parse;

/// `name: kind` of the arguments of the one kernel; `&` stands before what is written.
fn args(source: &str) -> Result<String, String> {
    let kernels = parse(source)?;
    assert_eq!(kernels.len(), 1, "{kernels:?}");
    let texts = kernels[0].args.iter().map(|arg| {
        let (writes, element) = (if arg.writes { "&" } else { "" }, arg.element.unwrap_or_default());
        format!("{writes}{}:{}{element}", arg.name, arg.kind)
    });
    Ok(texts.collect::<Vec<_>>().join(" "))
}

#[test]
fn arguments_are_read_as_they_are_written() {
    let source = "extern \"C\" __global__ void __launch_bounds__(256, 2) f_fwd_bf16(\n    bf16 *__restrict__ y, const bf16 *x, // input\n    float const* w, u32 rows, i32 a, const u64 b, i64 c, /* scale, */ float s) {\n}";
    let expected = "&y:Pointerbf16 x:Pointerbf16 w:Pointerfloat rows:U32 a:I32 b:U64 c:I64 s:F32";
    assert_eq!(args(source).unwrap(), expected);
    let source = "extern \"C\" __global__ __cluster_dims__(2, 1, 1) void __launch_bounds__(N * (1 + 1)) f_sm90(const __grid_constant__ TensorMap map, const __grid_constant__ Share share, const __grid_constant__ Widen job) {";
    assert_eq!(args(source).unwrap(), "map:TensorMap share:Share job:Widen");
    assert_eq!(args("extern \"C\" __global__ void f_x() {}").unwrap(), "");
}

#[test]
fn what_no_launch_can_pass_is_refused_with_its_line() {
    for (source, why) in [
        ("\nextern \"C\" __global__ void f(int n)", "line 2: `f`: argument `int n` is none"),
        ("extern \"C\" __global__ void f(bf16 **p)", "argument `bf16 **p`"),
        ("extern \"C\" __global__ void f(Map map)", "argument `Map map`"),
        ("extern \"C\" __global__ void f(float *)", "argument `float *`"),
        ("__global__ void f(u32 n)", "begins with `extern \"C\" __global__`"),
        ("#define K(T) extern \"C\" __global__ void f_##T(u32 n)", "begins with"),
        ("extern \"C\" __global__ void", "expected a kernel's name"),
        ("extern \"C\" __global__ void f;", "expected arguments after `f`"),
    ] {
        let error = parse(source).unwrap_err();
        assert!(error.contains(why), "{source}: {error}");
    }
}

#[test]
fn kernels_in_comments_are_none() {
    assert_eq!(parse("// extern \"C\" __global__ void f(int n)\n/* __global__ */ int a = 4 / 2;").unwrap(), []);
}

#[test]
fn spills_are_read_off_the_log_of_the_assembler() {
    let log = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'f' for 'sm_90a'\n\
        ptxas info    : Function properties for f\n    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
        ptxas info    : Used 40 registers\n\
        ptxas info    : Compiling entry function 'g' for 'sm_90a'\n\
        ptxas info    : Function properties for g\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Function properties for helper\n    4 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n";
    let found = Log::read(log);
    assert_eq!(found.kernels.into_iter().collect::<Vec<_>>(), ["f", "g"]);
    let expected = [("f", 16), ("g", 0), ("helper", 4)].map(|(name, bytes)| (name.to_owned(), bytes));
    assert_eq!(found.spills.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn a_declared_spill_says_why() {
    let of = |source: &str| Declared::read(source);
    let declared = Declared { kernel: "f".to_owned(), bytes: 16 };
    assert_eq!(of("// A comment.\n// spills: f 16 outside the loop\n").unwrap(), [declared]);
    assert!(of("// spills: f 16").is_err() && of("// spills: f many reasons").is_err());
}
