//! What an INT4 product would take on a GPU that nobody here has: computed from the bytes that it
//! moves and the instructions of its machine code, and printed as computed.
//!
//! A launch takes a fixed time and then the longer of two: the bytes at the memory's rate, or the
//! main loop's instructions at the rate of the unit that they keep busiest. Nothing else is counted:
//! no uneven last round of blocks, no waiting between the two.

use cuda_builder::NvvmArch;

use super::known::Figures;
use super::sass::Mix;
use crate::Error;

/// A GPU, by its data sheet.
#[derive(Debug)]
pub struct Gpu {
    name: &'static str,
    pub arch: NvvmArch,
    multiprocessors: f64,
    hertz: f64,
    /// Bytes a second, nominal.
    memory: f64,
    /// Share of `memory` that a read reaches.
    reached: f64,
    /// Seconds of a launch in a graph before its bytes flow: assumed.
    fixed: f64,
}

const GPUS: [Gpu; 1] = [
    // 320 GB/s, of which 265 are reported to be reached.
    Gpu {
        name: "t4",
        arch: NvvmArch::Compute75,
        multiprocessors: 40.0,
        hertz: 1.59e9,
        memory: 320e9,
        reached: 265.0 / 320.0,
        fixed: 2e-6,
    },
];

/// The seven matrices of the targets.
const SHAPES: [(usize, usize); 7] = [
    (1536, 1536),
    (8960, 1536),
    (1536, 8960),
    (4096, 4096),
    (14_336, 4096),
    (4096, 14_336),
    (151_936, 1536),
];

/// The GPU of that name, for the command line.
pub fn gpu(name: &str) -> Result<&'static Gpu, String> {
    let found = GPUS.iter().find(|gpu| gpu.name.eq_ignore_ascii_case(name));
    found.ok_or_else(|| {
        let names = GPUS.map(|gpu| gpu.name);
        format!("known are {}", names.join(", "))
    })
}

/// Cycles that an instruction of a warp keeps its unit of a quarter multiprocessor busy (sm_75): 16
/// lanes for arithmetic, 4 for conversions and special functions; a product m16n8k8 is 1024
/// multiply-adds, of which a quarter does 128 a cycle.
fn unit(kind: &str) -> (&'static str, f64) {
    match kind {
        "float" | "half" => ("multiply-add", 2.0),
        "matrix" => ("matrix", 8.0),
        "special" | "convert" => ("special", 8.0),
        "global load" | "global store" | "shared load" | "shared store" | "atomic" | "warp" => {
            ("load and store", 4.0)
        }
        // Moves go where there is room.
        "move" | "branch" | "wait" | "constant" => ("issue", 0.0),
        _ => ("integer", 2.0),
    }
}

/// Cycles of a quarter multiprocessor for a warp's pass of the loop, and the unit that they are of.
fn cycles(mix: &Mix) -> (f64, &'static str) {
    let mut units = vec![("issue", mix.instructions as f64)];
    for (kind, count) in &mix.kinds {
        let (name, cycles) = unit(kind);
        match units.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += cycles * *count as f64,
            None => units.push((name, cycles * *count as f64)),
        }
    }
    let (name, cycles) = units
        .into_iter()
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .expect("issue is there");
    (cycles, name)
}

/// Weights that share a scale, and whether there are minima, by the kernel's name; a name without
/// either takes both, and is computed for 128 and none.
fn format(kernel: &str) -> (usize, bool) {
    let has = |part: &str| format!("{kernel}_").contains(&format!("_{part}_"));
    let group = [32, 64].into_iter().find(|g| has(&format!("g{g}")));
    (group.unwrap_or(128), has("min"))
}

/// Seconds: of memory, of instructions, of the launch.
fn seconds(gpu: &Gpu, figures: &Figures, n: usize, k: usize) -> Option<(f64, f64, f64)> {
    let mix = figures.main_loop.as_ref()?;
    if mix.weight_bytes == 0 {
        return None;
    }
    let (group, mins) = format(&figures.resources.kernel);
    let scales = n * k.div_ceil(group) * if mins { 2 } else { 1 };
    let bytes = n * k / 2 + 2 * scales + 4 * (n + k);
    let memory = bytes as f64 / (gpu.memory * gpu.reached);
    let passes = (n * k) as f64 / (32 * 2 * mix.weight_bytes) as f64;
    let quarters = 4.0 * gpu.multiprocessors * gpu.hertz;
    let instructions = passes * cycles(mix).0 / quarters;
    Some((memory, instructions, gpu.fixed + memory.max(instructions)))
}

/// Rows of a Markdown table, a kernel and shape each.
///
/// # Errors
/// None of the kernels streams INT4 weights in a loop.
pub fn table(
    gpu: &Gpu,
    figures: &[Figures],
    shape: Option<(usize, usize)>,
) -> Result<String, Error> {
    let mut text = format!(
        "Computed, not measured: {} of {:.0} multiprocessors at {:.2} GHz, {:.0} of {:.0} GB/s, {:.0} us a launch.\n\n\
         | kernel | N x K | memory, us | instructions, us | of the unit | computed, us | / memory |\n\
         |---|---|---|---|---|---|---|\n",
        gpu.name.to_uppercase(),
        gpu.multiprocessors,
        gpu.hertz / 1e9,
        gpu.memory * gpu.reached / 1e9,
        gpu.memory / 1e9,
        gpu.fixed * 1e6,
    );
    let shapes = shape.map_or(SHAPES.to_vec(), |shape| vec![shape]);
    let mut rows = 0;
    for figures in figures.iter().filter(|figures| {
        figures.arch == gpu.arch && figures.resources.kernel.contains("_gemv_int4")
    }) {
        for &(n, k) in &shapes {
            let Some((memory, instructions, all)) = seconds(gpu, figures, n, k) else {
                continue;
            };
            let unit = figures.main_loop.as_ref().map_or("", |mix| cycles(mix).1);
            text.push_str(&format!(
                "| {} | {n} x {k} | {:.1} | {:.1} | {unit} | {:.1} | {:.2} |\n",
                figures.resources.kernel,
                memory * 1e6,
                instructions * 1e6,
                all * 1e6,
                all / memory,
            ));
            rows += 1;
        }
    }
    if rows == 0 {
        return Err(Error::Usage(
            "no INT4 kernel of that name loads its weights in a loop".to_owned(),
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cuda_builder::ptxas::KernelFigures;

    fn kernel(name: &str, kinds: &[(&'static str, usize)]) -> Figures {
        let mix = Mix {
            instructions: kinds.iter().map(|(_, count)| count).sum(),
            kinds: kinds.to_vec(),
            load_bytes: 128,
            weight_bytes: 128,
        };
        Figures {
            arch: NvvmArch::Compute75,
            resources: KernelFigures {
                kernel: name.into(),
                ..KernelFigures::default()
            },
            whole: mix.clone(),
            main_loop: Some(mix),
        }
    }

    #[test]
    fn the_busiest_unit_counts() {
        let mix = |kinds| kernel("", kinds).whole;
        assert_eq!(
            cycles(&mix(&[("integer", 10), ("move", 30)])),
            (40.0, "issue")
        );
        assert_eq!(
            cycles(&mix(&[("integer", 30), ("move", 10)])),
            (60.0, "integer")
        );
        assert_eq!(
            cycles(&mix(&[("float", 10), ("half", 20)])),
            (60.0, "multiply-add")
        );
        assert_eq!(
            cycles(&mix(&[("matrix", 8), ("integer", 8)])),
            (64.0, "matrix")
        );
    }

    #[test]
    fn a_launch_takes_the_longer_of_memory_and_instructions() {
        let t4 = gpu("T4").unwrap();
        // 7,143,424 bytes at 265 GB/s.
        let light = kernel("linear_gemv_int4_mma_g128", &[("integer", 200)]);
        let (memory, instructions, all) = seconds(t4, &light, 8960, 1536).unwrap();
        assert!((memory * 1e6 - 26.9).abs() < 0.2, "{memory}");
        // 1,680 passes of 400 cycles, 160 quarters at 1.59 GHz.
        assert!((instructions * 1e6 - 2.64).abs() < 0.01, "{instructions}");
        assert_eq!(all, t4.fixed + memory);
        let heavy = kernel("linear_gemv_int4_mma_g128", &[("integer", 20_000)]);
        let (_, instructions, all) = seconds(t4, &heavy, 8960, 1536).unwrap();
        assert_eq!(all, t4.fixed + instructions);
        let minima = kernel("linear_gemv_int4_mma_g32_min", &[("integer", 200)]);
        assert!(seconds(t4, &minima, 8960, 1536).unwrap().0 > 1.2 * memory);
    }

    #[test]
    fn tables_say_that_they_are_computed() {
        let kernels = [
            kernel("linear_gemv_int4_mma_g128", &[("integer", 200)]),
            kernel("linear_gemm_int4_t8", &[("integer", 200)]),
            kernel("logits_int8", &[("integer", 200)]),
        ];
        let t4 = gpu("t4").unwrap();
        let text = table(t4, &kernels, None).unwrap();
        assert!(text.starts_with("Computed, not measured: T4"), "{text}");
        assert_eq!(
            text.matches("linear_gemv_int4_mma_g128").count(),
            7,
            "{text}"
        );
        assert_eq!(
            table(t4, &kernels, Some((64, 64))).unwrap().lines().count(),
            5
        );
        assert!(table(t4, &kernels[2..], None).is_err());
        assert!(gpu("k80").unwrap_err().contains("t4"));
    }
}
