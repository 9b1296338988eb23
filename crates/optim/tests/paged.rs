//! States in pages: the same steps, from less memory.

mod common;

use common::arena;
use nibble_optim::{Error, Layout, Optimizer, OptimizerConfig, OptimizerName, Paging};
use nibble_tensor::{DType, Device, Rng, Shape, Tensor, cuda::Graph, ops::loss_scale::LossScale};

/// Parameters of these sizes, every second one without decay.
const SIZES: [usize; 5] = [300, 40_000, 7, 9_001, 5_000];
/// Small, so that there are many.
const PAGE: usize = 16 << 10;

fn layout() -> Layout {
    Layout::new(SIZES.iter().enumerate().map(|(i, &size)| (Shape::from([size]), i % 2 == 0)))
}

fn normal(seed: u64) -> Tensor {
    let len = SIZES.iter().sum();
    let values: Vec<f32> = (0..len as u64).map(|i| Rng::new(seed).normal(i)).collect();
    Tensor::from_slice(&arena(), &values, [len]).unwrap()
}

fn configs() -> Vec<OptimizerConfig> {
    OptimizerName::ALL.into_iter().filter(|name| name.is_paged()).map(|name| name.config(0.1)).collect()
}

fn folder(name: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("nibble-pages-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Everything resident, some of it, two pages of it.
fn budgets(config: &OptimizerConfig) -> [usize; 3] {
    let (all, least) = (config.state_bytes(&layout()), 2 * (PAGE + 4096));
    [all, (all / 2).max(least), least]
}

/// Pages for the device that the tests run on: in a file on the CPU.
fn paging(budget: usize, folder: &std::path::Path, name: &str) -> Paging {
    let file = (arena().device() == Device::Cpu).then(|| folder.join(name));
    Paging { device_memory: Some(budget), file, masters: false, page: Some(PAGE) }
}

fn run(optimizer: &mut Optimizer, params: &mut Tensor, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        optimizer.step(params, &normal(seed), 1e-2, 0.5).unwrap();
    }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect()
}

fn state_bits(optimizer: &Optimizer) -> Vec<(&'static str, Vec<u32>)> {
    let bits = |state: &Tensor| match state.to_vec::<u8>() {
        Ok(codes) => codes.into_iter().map(u32::from).collect(),
        Err(_) => bits(state),
    };
    optimizer.state().unwrap().iter().map(|(name, state)| (*name, bits(state))).collect()
}

#[test]
fn paged_steps_and_states_are_bit_for_bit_those_without_pages() {
    let folder = folder("steps");
    for config in configs() {
        let (mut whole, mut want) = (Optimizer::new(&arena(), &layout(), config).unwrap(), normal(0));
        run(&mut whole, &mut want, 1..5);
        for budget in budgets(&config) {
            let paging = paging(budget, &folder, "pages");
            let (mut paged, mut found) = (Optimizer::paged(&arena(), &layout(), config, &paging).unwrap(), normal(0));
            run(&mut paged, &mut found, 1..5);
            assert_eq!(bits(&found), bits(&want), "{config:?} {budget} {:?}", paged.pages());
            assert_eq!(state_bits(&paged), state_bits(&whole), "{config:?} {budget}");
            if budget < config.state_bytes(&layout()) {
                let (pages, resident) = paged.pages().unwrap();
                assert!(pages > 3 && resident < pages, "{pages} {resident}");
                // What two pages leave may still hold the last one, which is short.
                assert!(budget > 4 * PAGE || resident <= 1, "{resident}");
            }
        }
    }
}

/// Four steps on a GPU by `begin` and `apply`; with `captured` the second is recorded, and replayed from then on.
fn run_on_gpu(optimizer: &mut Optimizer, params: &mut Tensor, captured: bool) {
    let mut grads = normal(1);
    let arena = grads.arena().clone();
    let mut graph = None;
    for seed in 1..5 {
        grads.write(&normal(seed).to_f32_vec().unwrap()).unwrap();
        optimizer.begin(1e-2 / seed as f64).unwrap();
        if captured && seed == 2 {
            graph = Some(Graph::capture(&arena, || optimizer.apply(params, &grads, None, 1.0).map_err(Failed::from)).unwrap().0);
        }
        match &graph {
            Some(graph) => graph.launch().unwrap(),
            None => optimizer.apply(params, &grads, None, 1.0).unwrap(),
        }
    }
}

/// An error on its way through a capture.
#[derive(Debug)]
struct Failed(#[expect(dead_code, reason = "shown when it is unwrapped")] Error);

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<nibble_tensor::Error> for Failed {
    fn from(error: nibble_tensor::Error) -> Self {
        Self(error.into())
    }
}

#[test]
fn captured_steps_are_those_one_by_one_with_pages_and_without() {
    if arena().device() == Device::Cpu {
        return;
    }
    for config in OptimizerName::ALL.map(|name| name.config(0.1)) {
        let (mut plain, mut want) = (Optimizer::new(&arena(), &layout(), config).unwrap(), normal(0));
        run_on_gpu(&mut plain, &mut want, false);
        let mut captured = normal(0);
        run_on_gpu(&mut Optimizer::new(&arena(), &layout(), config).unwrap(), &mut captured, true);
        assert_eq!(bits(&captured), bits(&want), "{config:?}");
        let paging = Paging { device_memory: Some(3 * (PAGE + 4096)), file: None, masters: false, page: Some(PAGE) };
        let mut paged = normal(0);
        run_on_gpu(&mut Optimizer::paged(&arena(), &layout(), config, &paging).unwrap(), &mut paged, true);
        assert_eq!(bits(&paged), bits(&want), "{config:?} paged");
    }
}

#[test]
fn steps_that_a_loss_scale_spoilt_leave_no_trace_on_a_gpu() {
    if arena().device() == Device::Cpu {
        return;
    }
    let scale = LossScale::new(&arena()).unwrap();
    let nan = Tensor::tiled(&arena(), &[1.0, f32::NAN], [SIZES.iter().sum()]).unwrap();
    let paging = Paging { device_memory: Some(3 * (PAGE + 4096)), file: None, masters: false, page: Some(PAGE) };
    for config in OptimizerName::ALL.map(|name| name.config(0.1)) {
        let (mut plain, mut want) = (Optimizer::new(&arena(), &layout(), config).unwrap(), normal(0));
        run_on_gpu(&mut plain, &mut want, false);
        let whole = Optimizer::new(&arena(), &layout(), config).unwrap();
        for mut optimizer in [whole, Optimizer::paged(&arena(), &layout(), config, &paging).unwrap()] {
            let mut found = normal(0);
            for _ in 0..2 {
                optimizer.begin(1e-2).unwrap();
                scale.divide(optimizer.report().unwrap()).unwrap();
                optimizer.apply(&mut found, &nan, None, 1.0).unwrap();
            }
            assert_eq!(optimizer.steps().unwrap(), 0);
            run_on_gpu(&mut optimizer, &mut found, true);
            assert_eq!(optimizer.steps().unwrap(), 4);
            assert_eq!(bits(&found), bits(&want), "{config:?}");
            assert_eq!(state_bits(&optimizer), state_bits(&plain), "{config:?}");
        }
    }
}

#[test]
fn values_in_pages_are_those_outside_bit_for_bit() {
    let paging = Paging { masters: true, ..paging(3 * (2 * PAGE + 4096), &folder("values"), "pages") };
    if arena().device() == Device::Cpu {
        let config = OptimizerName::PagedAdamW8bit.config(0.1);
        let error = Optimizer::paged(&arena(), &layout(), config, &paging).map(drop).unwrap_err();
        assert!(matches!(error, Error::MastersOnCpu), "{error}");
        return;
    }
    for config in configs() {
        let (mut plain, mut want) = (Optimizer::new(&arena(), &layout(), config).unwrap(), normal(0));
        run(&mut plain, &mut want, 1..4);
        let mut optimizer = Optimizer::paged(&arena(), &layout(), config, &paging).unwrap();
        assert!(optimizer.holds_values());
        optimizer.set_values(&normal(0)).unwrap();
        let mut copy = normal(0).to_dtype(DType::Bf16).unwrap();
        run(&mut optimizer, &mut copy, 1..4);
        assert_eq!(bits(&optimizer.values().unwrap().unwrap()), bits(&want), "{config:?}");
        assert_eq!(bits(&copy), bits(&want.to_dtype(DType::Bf16).unwrap()), "{config:?}");
        assert_eq!(state_bits(&optimizer), state_bits(&plain), "{config:?}");
    }
}

#[test]
fn a_state_goes_from_pages_to_none_and_back() {
    let folder = folder("state");
    for config in configs() {
        let (mut straight, mut want) = (Optimizer::new(&arena(), &layout(), config).unwrap(), normal(0));
        run(&mut straight, &mut want, 1..7);

        let paging = paging(2 * (PAGE + 4096), &folder, "pages");
        let load = |to: &mut Optimizer, from: &Optimizer| {
            let state = from.state().unwrap();
            to.load_state(from.steps().unwrap(), &state.iter().map(|(name, state)| (*name, state)).collect::<Vec<_>>()).unwrap();
        };
        let mut params = normal(0);
        let mut first = Optimizer::paged(&arena(), &layout(), config, &paging).unwrap();
        run(&mut first, &mut params, 1..3);
        let mut second = Optimizer::new(&arena(), &layout(), config).unwrap();
        load(&mut second, &first);
        run(&mut second, &mut params, 3..5);
        let mut third = Optimizer::paged(&arena(), &layout(), config, &paging).unwrap();
        load(&mut third, &second);
        run(&mut third, &mut params, 5..7);
        assert_eq!(bits(&params), bits(&want), "{config:?}");
    }
}

#[test]
fn what_cannot_hold_the_pages_is_one_error() {
    if arena().device() != Device::Cpu {
        let config = OptimizerName::PagedAdamW8bit.config(0.0);
        let little = Paging { device_memory: Some(PAGE), file: None, masters: false, page: Some(PAGE) };
        let error = Optimizer::paged(&arena(), &layout(), config, &little).map(drop).unwrap_err();
        assert!(matches!(error, Error::DeviceMemory { found: PAGE, .. }), "{error}");
        return;
    }
    let (folder, config) = (folder("errors"), OptimizerName::PagedAdamW32bit.config(0.0));
    let refused = |file: &std::path::Path| {
        let paging = Paging { device_memory: None, file: Some(file.to_owned()), masters: false, page: Some(PAGE) };
        Optimizer::paged(&arena(), &layout(), config, &paging).map(drop).unwrap_err().to_string()
    };
    let used = folder.join("used");
    std::fs::write(&used, "precious").unwrap();
    assert!(refused(&used).contains("it exists, and is not empty"));
    assert_eq!(std::fs::read(&used).unwrap(), b"precious");
    assert!(refused(&folder.join("missing/pages")).starts_with("optim_page_file: `"));
    // A disk that is always full.
    let full = std::path::Path::new("/dev/full");
    if full.exists() {
        let error = refused(full);
        assert!(error.starts_with("optim_page_file: `/dev/full` cannot hold pages of "), "{error}");
    }
}
