//! Matrix products: by a kernel of our own where it serves ([`super::product`]), else through cuBLASLt, with a plan kept for each shape.

use std::collections::HashMap;

use cudarc::cublaslt::{result as lt, sys};

use super::{context::CudaDevice, driver::check, widen::WidenBeside};
use crate::{DType, Error, Owner, Result};

/// Bytes that cuBLASLt may use between the parts of a product; what the vendor advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Choices of the library that are timed.
const CANDIDATES: usize = 8;
/// Times each is run.
const REPEATS: usize = 3;
/// Floating-point operations from which a product is worth it: some 50 microseconds on a large GPU.
const WORTH_TIMING: f64 = 3e10;
/// Rows of a product that comes again are a multiple of this: training pads its streams, and a prompt's length comes once. Timing waits
/// for the device.
const COMES_AGAIN: usize = 64;
/// Shapes whose plans are kept.
const MOST_PLANS: usize = 2048;
/// How the parts of a product that is split along its reduction are added up: in f32. In the result's type each part would be rounded
/// before what is there already is added, and a small addend lost.
const REDUCTION: u32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// One operand as it lies in memory: rows of `ld` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Matrix {
    /// Address of the first element.
    pub(crate) address: u64,
    /// Elements from one row to the next.
    pub(crate) ld: usize,
    /// Whether the product reads its transpose.
    pub(crate) transposed: bool,
}

/// C [m, n] = alpha A [m, k] B [k, n] (+ C) (+ bias of each column), sums in f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gemm {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
    /// Address and row pitch of the result.
    pub(crate) c: u64,
    pub(crate) ldc: usize,
    pub(crate) alpha: f32,
    /// Adds to what is there.
    pub(crate) accumulate: bool,
    /// `[n]`, in the result's type.
    pub(crate) bias: Option<u64>,
    /// Of A and B.
    pub(crate) input: DType,
    /// Of C.
    pub(crate) output: DType,
}

/// The library, its workspace, and what it chose for each shape.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: HashMap<Key, Plan>,
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    pitches: [usize; 3],
    transposed: [bool; 2],
    accumulate: bool,
    bias: bool,
    types: [DType; 2],
    /// Addresses on 16 bytes: the library's fast kernels need it.
    aligned: bool,
}

#[derive(Clone, Copy)]
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Key {
    fn of(gemm: &Gemm) -> Self {
        let addresses = [gemm.a.address, gemm.b.address, gemm.c, gemm.bias.unwrap_or(0)];
        Self {
            sizes: [gemm.m, gemm.n, gemm.k],
            pitches: [gemm.a.ld, gemm.b.ld, gemm.ldc],
            transposed: [gemm.a.transposed, gemm.b.transposed],
            accumulate: gemm.accumulate,
            bias: gemm.bias.is_some(),
            types: [gemm.input, gemm.output],
            aligned: addresses.iter().all(|address| address % 16 == 0),
        }
    }
}

impl Plan {
    fn destroy(self) {
        // SAFETY: made by `choose`, and not used again; launches have read them.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.description);
            for layout in [self.a, self.b, self.c] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

// SAFETY: descriptors and handles are plain memory of the library, used under the mutex that holds `Blas`.
unsafe impl Send for Blas {}

impl CudaDevice {
    /// Whether everything is there to compute with: cuBLASLt, and kernels for this architecture.
    ///
    /// # Errors
    /// [`Error::Cuda`] and [`Error::Kernel`] with what is missing and how to get it.
    pub fn check(self) -> Result<()> {
        if self.is_dry() {
            return Ok(());
        }
        self.bind()?;
        let mut blas = self.gpu().blas();
        if blas.is_none() {
            *blas = Some(self.charge(Owner::Libraries, || Blas::open(self))?);
        }
        drop(blas);
        self.expect_kernel("add_f32")
    }

    /// Adds a product to the stream.
    ///
    /// # Errors
    /// [`Error::Cuda`] when cuBLASLt is missing or refuses the product.
    pub(crate) fn gemm(self, gemm: &Gemm) -> Result<()> {
        if gemm.m == 0 || gemm.n == 0 {
            return Ok(());
        }
        if self.serves_gemm(gemm) {
            return self.product(gemm, &WidenBeside::default());
        }
        if self.is_dry() {
            return Ok(());
        }
        self.bind()?;
        let mut blas = self.gpu().blas();
        if blas.is_none() {
            *blas = Some(self.charge(Owner::Libraries, || Blas::open(self))?);
        }
        let Some(blas) = blas.as_mut() else { return Ok(()) };
        let name = || format!("matmul {} x {} x {}{}", gemm.m, gemm.n, gemm.k, if gemm.accumulate { " +=" } else { "" });
        self.timed(name, || blas.run(self, gemm))
    }
}

impl Blas {
    fn open(device: CudaDevice) -> Result<Self> {
        if let Some(path) = &device.options().libraries.cublaslt {
            // SAFETY: loading a library runs its initialisers; it is the vendor's, found under its own name. It stays loaded, so that
            // cudarc finds it by that name.
            match unsafe { libloading::Library::new(path) } {
                Ok(library) => std::mem::forget(library),
                Err(error) => return Err(Error::Cuda { call: "cuBLASLt", reason: error.to_string() }),
            }
        }
        // SAFETY: only looks for the library by its names.
        if !unsafe { sys::is_culib_present() } {
            let reason = "libcublasLt was not found: `pip install nvidia-cublas-cu12`, or a CUDA toolkit".to_owned();
            return Err(Error::Cuda { call: "cuBLASLt", reason });
        }
        let handle = lt::create_handle().map_err(|error| failed("cublasLtCreate", error))?;
        let mut workspace = 0;
        // SAFETY: a context is bound; `workspace` outlives the call.
        check("cuMemAlloc", unsafe { cudarc::driver::sys::cuMemAlloc_v2(&raw mut workspace, WORKSPACE) })?;
        Ok(Self { handle, workspace, plans: HashMap::new() })
    }

    fn run(&mut self, device: CudaDevice, gemm: &Gemm) -> Result<()> {
        let key = Key::of(gemm);
        if let Some(plan) = self.plans.get(&key) {
            return self.launch(gemm, plan, device.stream());
        }
        // The library loads a kernel when it is first launched.
        let plan = device.charge(Owner::Libraries, || {
            let plan = self.choose(device, gemm, key.aligned)?;
            self.launch(gemm, &plan, device.stream())?;
            Ok(plan)
        })?;
        if self.plans.len() == MOST_PLANS {
            self.plans.drain().for_each(|(_, plan)| plan.destroy());
        }
        self.plans.insert(key, plan);
        Ok(())
    }

    fn launch(&self, gemm: &Gemm, plan: &Plan, stream: cudarc::driver::sys::CUstream) -> Result<()> {
        if let Some(bias) = gemm.bias {
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            // SAFETY: the descriptor is this plan's; the library copies the value.
            unsafe { lt::set_matmul_desc_attribute(plan.description, attribute, (&raw const bias).cast(), 8) }
                .map_err(|error| failed("cublasLtMatmulDescSetAttribute", error))?;
        }
        let beta = f32::from(u8::from(gemm.accumulate));
        let (a, b, c) = (gemm.a.address as *const _, gemm.b.address as *const _, gemm.c as *mut std::ffi::c_void);
        // The library counts columns first: row-major C = A B is its Cᵀ = Bᵀ Aᵀ.
        // SAFETY: the layouts describe what the addresses hold, as the callers in `ops` checked; alpha and beta are read before the
        // call returns.
        unsafe {
            lt::matmul(
                self.handle,
                plan.description,
                (&raw const gemm.alpha).cast(),
                (&raw const beta).cast(),
                b,
                plan.b,
                a,
                plan.a,
                c,
                plan.c,
                c,
                plan.c,
                &raw const plan.algorithm,
                self.workspace as *mut _,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(|error| failed("cublasLtMatmul", error))
    }

    /// The fastest of the library's choices for a product, by timing them on what is there.
    fn choose(&self, device: CudaDevice, gemm: &Gemm, aligned: bool) -> Result<Plan> {
        let (input, output) = (data_type(gemm.input)?, data_type(gemm.output)?);
        let description = lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)
            .map_err(|error| failed("cublasLtMatmulDescCreate", error))?;
        let transpose = |transposed| i32::from(transposed);
        set(description, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &transpose(gemm.b.transposed))?;
        set(description, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, &transpose(gemm.a.transposed))?;
        if let Some(bias) = gemm.bias {
            set(
                description,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            )?;
            set(description, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let stored = |transposed, rows, cols| if transposed { (rows, cols) } else { (cols, rows) };
        let (a_rows, a_cols) = stored(gemm.a.transposed, gemm.m, gemm.k);
        let (b_rows, b_cols) = stored(gemm.b.transposed, gemm.k, gemm.n);
        let layout = |kind, rows: usize, cols: usize, ld: usize| {
            lt::create_matrix_layout(kind, rows as u64, cols as u64, ld as i64)
                .map_err(|error| failed("cublasLtMatrixLayoutCreate", error))
        };
        let a = layout(input, a_rows, a_cols, gemm.a.ld)?;
        let b = layout(input, b_rows, b_cols, gemm.b.ld)?;
        let c = layout(output, gemm.n, gemm.m, gemm.ldc)?;
        let alignment = [gemm.input, gemm.output].map(|dtype| if aligned { 16 } else { dtype.size() as u32 });
        let candidates = self.heuristics(description, [a, b, c], alignment)?;
        let Some(&first) = candidates.first() else {
            return Err(Error::Cuda { call: "cublasLtMatmulAlgoGetHeuristic", reason: "no algorithm serves the product".into() });
        };
        let mut plan = Plan { description, a, b, c, algorithm: first };
        // Small products take as long as their launch; one that adds to its result cannot be repeated on it.
        let work = 2.0 * gemm.m as f64 * gemm.n as f64 * gemm.k as f64;
        let comes_again = gemm.m.is_multiple_of(COMES_AGAIN);
        if work > WORTH_TIMING && comes_again && !gemm.accumulate && !device.is_capturing() {
            plan.algorithm = self.fastest(device, gemm, plan, &candidates);
        }
        Ok(plan)
    }

    /// The fastest by a few percent at least, else the first: so that noise does not choose. Timing under load instead chose others
    /// for large products, and steps were not faster by it.
    fn fastest(
        &self,
        device: CudaDevice,
        gemm: &Gemm,
        plan: Plan,
        candidates: &[sys::cublasLtMatmulAlgo_t],
    ) -> sys::cublasLtMatmulAlgo_t {
        let time = |algorithm| {
            let plan = Plan { algorithm, ..plan };
            let run = || device.milliseconds(|| self.launch(gemm, &plan, device.stream()));
            // One to load the kernel, then the shortest of a few.
            run()?;
            (0..REPEATS).try_fold(f64::INFINITY, |least, _| Ok::<_, Error>(least.min(run()?)))
        };
        let times: Vec<f64> = candidates.iter().map(|&algorithm| time(algorithm).unwrap_or(f64::INFINITY)).collect();
        let best = (0..times.len()).min_by(|&i, &j| times[i].total_cmp(&times[j])).unwrap_or(0);
        candidates[if times[best] < 0.98 * times[0] { best } else { 0 }]
    }

    /// The library's choices, the one it thinks best first.
    fn heuristics(
        &self,
        description: sys::cublasLtMatmulDesc_t,
        [a, b, c]: [sys::cublasLtMatrixLayout_t; 3],
        [inputs, outputs]: [u32; 2],
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        let preference = lt::create_matmul_pref().map_err(|error| failed("cublasLtMatmulPreferenceCreate", error))?;
        let most: usize = WORKSPACE;
        let attributes = [
            (sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, inputs),
            (sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, inputs),
            (sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, outputs),
            (sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, outputs),
            (sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, REDUCTION),
        ];
        // SAFETY: the preference was just made; the values outlive the calls, which copy them.
        let found = unsafe {
            let workspace = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_pref_attribute(preference, workspace, (&raw const most).cast(), 8).and_then(|()| {
                attributes.into_iter().try_for_each(|(attribute, value)| {
                    lt::set_matmul_pref_attribute(preference, attribute, (&raw const value).cast(), 4)
                })
            })
        };
        // SAFETY: an all-zero result is a value to be written over.
        let mut results: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: descriptor, layouts and preference are live; `results` has room for as many as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description,
                b,
                a,
                c,
                c,
                preference,
                CANDIDATES as i32,
                results.as_mut_ptr(),
                &raw mut count,
            )
        };
        // SAFETY: the preference is not used again.
        let _ = unsafe { lt::destroy_matmul_pref(preference) };
        found.and_then(|()| status.result()).map_err(|error| failed("cublasLtMatmulAlgoGetHeuristic", error))?;
        let good = |found: &&sys::cublasLtMatmulHeuristicResult_t| found.state.result().is_ok();
        Ok(results[..count as usize].iter().filter(good).map(|found| found.algo).collect())
    }
}

fn set<T>(description: sys::cublasLtMatmulDesc_t, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
    // SAFETY: the descriptor is live; the library copies `size_of::<T>()` bytes of the value, its documented type.
    unsafe { lt::set_matmul_desc_attribute(description, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
        .map_err(|error| failed("cublasLtMatmulDescSetAttribute", error))
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType_t> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        DType::Bf16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        DType::F16 => Ok(sys::cudaDataType_t::CUDA_R_16F),
        found => Err(Error::DType { op: "matmul", operand: "operand", expected: "float32, bfloat16 or float16", found }),
    }
}

fn failed(call: &'static str, error: lt::CublasError) -> Error {
    Error::Cuda { call, reason: error.to_string() }
}
