//! Where a token's time goes, as `--trace` prints it.

use engine::backend::KernelTime;

/// A line a kernel, the longest first: its time, what it computes, which variant it is and why.
pub fn table(kernels: &[KernelTime]) -> String {
    let total: f64 = kernels.iter().map(|kernel| kernel.us).sum();
    let mut kernels: Vec<&KernelTime> = kernels.iter().collect();
    kernels.sort_by(|a, b| b.us.total_cmp(&a.us));
    let mut text = format!(
        "one token: {total:.1} us\n{:>9} {:>6} {:>5} {:>8}  step",
        "us", "%", "x", "us each"
    );
    for kernel in kernels {
        let KernelTime {
            step,
            kernel,
            launch,
            launches,
            us,
        } = kernel;
        let each = us / *launches as f64;
        let share = 100.0 * us / total;
        let line = format!("\n{us:>9.1} {share:>6.1} {launches:>5} {each:>8.2}  {step}: {kernel}");
        text.push_str(&line);
        if !launch.is_empty() {
            text.push_str(&format!(", {launch}"));
        }
    }
    // Steps are named after tensors of a file.
    text.retain(|c| c == '\n' || !c.is_control());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_first_with_its_launch() {
        let kernel = |step: &str, launch: &str, launches, us| KernelTime {
            step: step.to_owned(),
            kernel: "a_kernel",
            launch: launch.to_owned(),
            launches,
            us,
        };
        let text = table(&[
            kernel("short", "", 1, 10.0),
            kernel("lo\u{1b}ng", "8x8: split 2 (rule)", 3, 30.0),
        ]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "one token: 40.0 us");
        assert_eq!(
            lines[2],
            "     30.0   75.0     3    10.00  long: a_kernel, 8x8: split 2 (rule)"
        );
        assert_eq!(lines[3], "     10.0   25.0     1    10.00  short: a_kernel");
    }
}
