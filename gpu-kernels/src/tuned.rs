//! Launches that `cargo xtask tune` found fastest, by GPU, kernel and shape: `gpu-kernels/tuned.toml`.
//!
//! A row holds for the kernel that it was measured with, which [`revision`] tells from its PTX: a
//! kernel that is changed leaves its rows behind. Where no row holds, the kernel's own rule decides.

use std::fmt;

use toml::{Table, Value};

/// The table as it is checked in.
const TABLE: &str = include_str!("../tuned.toml");

/// What a kernel leaves to be chosen of its launch: a few named numbers.
pub trait Launches: Copy + PartialEq + fmt::Debug {
    /// Their names, in order.
    const NAMES: &'static [&'static str];

    /// The numbers, as many as names.
    fn numbers(&self) -> Vec<u32>;

    /// The launch of these numbers, as many as names; `None` where they make none.
    fn of(numbers: &[u32]) -> Option<Self>;

    /// Its numbers, each with its name.
    fn named(&self) -> Vec<(String, u32)> {
        let names = Self::NAMES.iter().map(|name| (*name).to_owned());
        names.zip(self.numbers()).collect()
    }
}

/// `split 14, teams 1, blocks 96`.
pub fn shown<L: Launches>(launch: &L) -> String {
    let numbers = launch.numbers();
    let pairs = L::NAMES.iter().zip(numbers);
    pairs
        .map(|(name, number)| format!("{name} {number}"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// What was timed to choose a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timed {
    /// The launch by itself.
    Launch,
    /// A whole token of a model that has it in every layer.
    Token,
}

impl Timed {
    /// Names of both times in the table: the row's launch, the rule's.
    fn names(self) -> [&'static str; 2] {
        match self {
            Timed::Launch => ["us", "rule_us"],
            Timed::Token => ["token_us", "rule_token_us"],
        }
    }
}

/// A measured launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Name of the GPU, as the driver gives it.
    pub gpu: String,
    /// Compute capability times ten that the kernel was compiled for.
    pub tier: u32,
    /// Entry name.
    pub kernel: String,
    /// Shape, as the kernel's module writes it.
    pub shape: String,
    /// [`revision`] of the kernel.
    pub revision: u32,
    /// Names and numbers of the launch.
    pub launch: Vec<(String, u32)>,
    /// What was timed.
    pub timed: Timed,
    /// Microseconds that it took.
    pub us: f64,
    /// Microseconds that it took with the rule's launch, in the same run.
    pub rule_us: f64,
}

impl Row {
    fn of<L: Launches>(&self) -> Option<L> {
        let number = |name: &&str| {
            let found = self.launch.iter().find(|(known, _)| known == name)?;
            Some(found.1)
        };
        let numbers: Vec<u32> = L::NAMES.iter().map(number).collect::<Option<_>>()?;
        L::of(&numbers)
    }

    /// Whether both are of the same GPU, tier, kernel and shape: the later one replaces the other.
    pub fn replaces(&self, other: &Row) -> bool {
        let key = |row: &Row| {
            let Row {
                gpu,
                tier,
                kernel,
                shape,
                ..
            } = row;
            (gpu.clone(), *tier, kernel.clone(), shape.clone())
        };
        key(self) == key(other)
    }
}

/// The rows that are checked in.
pub fn checked_in() -> Vec<Row> {
    rows(TABLE).expect("a test reads tuned.toml")
}

/// Reads a table.
///
/// # Errors
/// What is wrong with it, and in which row.
pub fn rows(text: &str) -> Result<Vec<Row>, String> {
    let table: Table = text.parse().map_err(|error| format!("{error}"))?;
    let mut rows = Vec::new();
    for (gpu, list) in &table {
        let list = list
            .as_array()
            .ok_or_else(|| format!("`{gpu}` is no list of rows"))?;
        for (number, value) in list.iter().enumerate() {
            let row = row(gpu, value)
                .map_err(|reason| format!("row {} of `{gpu}`: {reason}", number + 1))?;
            rows.push(row);
        }
    }
    Ok(rows)
}

fn row(gpu: &str, value: &Value) -> Result<Row, String> {
    let text = |name: &str| {
        let found = value.get(name).and_then(Value::as_str);
        found.ok_or_else(|| format!("`{name}` is no text"))
    };
    let us = |name: &str| {
        let found = value.get(name).and_then(Value::as_float);
        let found = found.filter(|us| us.is_finite() && *us > 0.0);
        found.ok_or_else(|| format!("`{name}` is no time"))
    };
    let timed = match value.get("token_us") {
        Some(_) => Timed::Token,
        None => Timed::Launch,
    };
    let [row_us, rule_us] = timed.names();
    let number = |value: &Value| value.as_integer().and_then(|n| u32::try_from(n).ok());
    let launch = value.get("launch").and_then(Value::as_table);
    let launch = launch.ok_or("`launch` is no table of numbers")?;
    Ok(Row {
        gpu: gpu.to_owned(),
        tier: value
            .get("tier")
            .and_then(number)
            .ok_or("`tier` is no number")?,
        kernel: text("kernel")?.to_owned(),
        shape: text("shape")?.to_owned(),
        revision: u32::from_str_radix(text("revision")?, 16)
            .map_err(|_| "`revision` is no hexadecimal number")?,
        launch: launch
            .iter()
            .map(|(name, value)| {
                let number = number(value).ok_or_else(|| format!("`{name}` is no number"))?;
                Ok((name.clone(), number))
            })
            .collect::<Result<_, String>>()?,
        timed,
        us: us(row_us)?,
        rule_us: us(rule_us)?,
    })
}

/// Writes a table, a line a row: what [`rows`] reads.
pub fn text(rows: &[Row]) -> String {
    let mut rows: Vec<&Row> = rows.iter().collect();
    rows.sort_by_key(|row| (&row.gpu, row.tier, &row.kernel, &row.shape));
    let quoted = |text: &str| Value::from(text).to_string();
    let mut text = String::from(
        "# Launches that `cargo xtask tune` found fastest. `revision` is of the kernel's PTX: a row of\n\
         # another kernel than the program's is passed over. `rule_us`: what the rule's launch took; times of\n\
         # `token` are of a whole token of a model that runs the launch in every layer.\n",
    );
    for gpu in rows.chunk_by(|a, b| a.gpu == b.gpu) {
        text.push_str(&format!("\n{} = [\n", quoted(&gpu[0].gpu)));
        for row in gpu {
            let launch = row.launch.iter();
            let mut launch: Vec<String> = launch
                .map(|(name, number)| format!("{name} = {number}"))
                .collect();
            let [us, rule_us] = row.timed.names();
            // As they are read: a row stays the same text.
            launch.sort();
            text.push_str(&format!(
                "    {{ kernel = {}, tier = {}, shape = {}, revision = \"{:08x}\", \
                 launch = {{ {} }}, {us} = {:.3}, {rule_us} = {:.3} }},\n",
                quoted(&row.kernel),
                row.tier,
                quoted(&row.shape),
                row.revision,
                launch.join(", "),
                row.us,
                row.rule_us,
            ));
        }
        text.push_str("]\n");
    }
    text
}

/// Which version of `kernel` a PTX holds: a hash of its code, or with a `*` at its end of all kernels whose
/// names begin so. Comments, source lines and the numbers that labels get from the kernels before it are left
/// out. `None` if it is not there.
pub fn revision(ptx: &str, kernel: &str) -> Option<u32> {
    let start = match kernel.strip_suffix('*') {
        Some(beginning) => format!(".entry {beginning}"),
        None => format!(".entry {kernel}("),
    };
    let mut hash = None;
    for (at, _) in ptx.match_indices(&start) {
        let code = &ptx[at..];
        let code = &code[..code.find("\n}")?];
        hash = Some(hash_code(hash.unwrap_or(FNV_OFFSET), code));
    }
    hash.map(|hash| (hash ^ (hash >> 32)) as u32)
}

fn hash_code(mut hash: u64, code: &str) -> u64 {
    for line in code.lines() {
        let line = line.split("//").next().unwrap_or_default().trim();
        if line.is_empty() || line.starts_with(".loc") {
            continue;
        }
        // `$L__BB12_3`: the third label of the thirteenth function.
        for (number, part) in line.split("$L__BB").enumerate() {
            let part = match number {
                0 => part,
                _ => part.trim_start_matches(|c: char| c.is_ascii_digit()),
            };
            hash = fnv(hash, part.as_bytes());
        }
        hash = fnv(hash, b"\n");
    }
    hash
}

/// FNV-1a, 64 bits (Fowler, Noll, Vo; RFC 9923).
fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(hash, step)
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// The rows for the GPU and the kernels at hand.
#[derive(Debug, Clone, Default)]
pub struct Tuned {
    rows: Vec<Row>,
    /// Rows whose kernel has changed since: kernel and shape.
    outdated: Vec<(String, String)>,
}

impl Tuned {
    /// No rows: every launch is the rule's.
    pub const fn none() -> Tuned {
        Tuned {
            rows: Vec::new(),
            outdated: Vec::new(),
        }
    }

    /// The checked-in rows of the GPU named `gpu`, for kernels compiled for `tier` into `ptx`.
    pub fn load(gpu: &str, tier: u32, ptx: &str) -> Tuned {
        Tuned::among(checked_in(), gpu, tier, ptx)
    }

    fn among(rows: Vec<Row>, gpu: &str, tier: u32, ptx: &str) -> Tuned {
        let mut tuned = Tuned::none();
        for row in rows {
            if row.gpu != gpu || row.tier != tier {
                continue;
            }
            if revision(ptx, &row.kernel) == Some(row.revision) {
                tuned.rows.push(row);
            } else {
                tuned.outdated.push((row.kernel, row.shape));
            }
        }
        tuned
    }

    /// These and `row`, which is of the GPU and the kernels at hand, in the place of what it replaces.
    #[must_use]
    pub fn with(&self, row: Row) -> Tuned {
        let mut tuned = self.clone();
        tuned.rows.retain(|known| !row.replaces(known));
        tuned.rows.push(row);
        tuned
    }

    /// The launch of the table for a shape, if it has one that holds.
    pub fn found<L: Launches>(&self, kernel: &str, shape: &str) -> Option<L> {
        let mut rows = self.rows.iter();
        rows.find(|row| row.kernel == kernel && row.shape == shape)
            .and_then(Row::of)
    }

    /// The launch for a shape: that of the table, or else what `rule` gives.
    pub fn choose<L: Launches>(
        &self,
        kernel: &str,
        shape: &str,
        rule: impl FnOnce() -> L,
    ) -> Chosen<L> {
        if let Some(launch) = self.found(kernel, shape) {
            return Chosen {
                launch,
                why: Why::Tuned,
            };
        }
        let outdated = |(of, at): &(String, String)| of == kernel && at == shape;
        let made = |row: &Row| row.kernel == kernel && row.shape == shape;
        let why = if self.rows.iter().any(made) || self.outdated.iter().any(outdated) {
            Why::Outdated
        } else if self.rows.is_empty() && self.outdated.is_empty() {
            Why::UnknownGpu
        } else {
            Why::UnknownShape
        };
        Chosen {
            launch: rule(),
            why,
        }
    }
}

/// A launch, and why it is this one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chosen<L> {
    /// What to launch.
    pub launch: L,
    /// Where it comes from.
    pub why: Why,
}

/// Where a launch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The table.
    Tuned,
    /// The rule, as the kernel has changed since it was tuned.
    Outdated,
    /// The rule, as nothing was tuned on this GPU and tier.
    UnknownGpu,
    /// The rule, as this shape was not tuned.
    UnknownShape,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Why::Tuned => "tuned",
            Why::Outdated => "rule: the kernel has changed since it was tuned",
            Why::UnknownGpu => "rule: nothing is tuned for this GPU",
            Why::UnknownShape => "rule: this shape is not tuned",
        })
    }
}

impl<L: Launches> fmt::Display for Chosen<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", shown(&self.launch), self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Split {
        split: u32,
        blocks: u32,
    }

    impl Launches for Split {
        const NAMES: &'static [&'static str] = &["split", "blocks"];

        fn numbers(&self) -> Vec<u32> {
            vec![self.split, self.blocks]
        }

        fn of(numbers: &[u32]) -> Option<Split> {
            let &[split, blocks] = numbers else {
                return None;
            };
            (split > 0).then_some(Split { split, blocks })
        }
    }

    const PTX: &str = "\
.visible .entry other(\n)\n{\n\tbra.uni \t$L__BB0_1;\n$L__BB0_1:\n\tret;\n\n}\n\
.visible .entry gemv(\n\t.param .u64 gemv_param_0\n)\n{\n\t.loc 1 2 3\n\
$L__BB1_1: // a loop\n\t@%p1 bra \t$L__BB1_1;\n\tret;\n\n}\n";

    fn measured(shape: &str, revision: u32) -> Row {
        Row {
            gpu: "NVIDIA \"T4\"".into(),
            tier: 75,
            kernel: "gemv".into(),
            shape: shape.into(),
            revision,
            launch: vec![("blocks".into(), 96), ("split".into(), 14)],
            timed: Timed::Launch,
            us: 4.125,
            rule_us: 4.5,
        }
    }

    #[test]
    fn the_checked_in_table_is_read_and_written_the_same() {
        let read = rows(TABLE).expect("a table");
        assert_eq!(text(&read), TABLE);
        for (number, row) in read.iter().enumerate() {
            assert!(
                !read[..number].iter().any(|earlier| earlier.replaces(row)),
                "{row:?}"
            );
        }
    }

    #[test]
    fn tables_come_back_as_they_were_written() {
        let mut written = [measured("64x64", 7), measured("64x96 add", u32::MAX)];
        written[1].timed = Timed::Token;
        assert_eq!(rows(&text(&written)).as_deref(), Ok(&written[..]));
        for broken in [
            "gpu = 1",
            "gpu = [{}]",
            "gpu = [{ kernel = \"a\", tier = -1 }]",
            "gpu = [",
        ] {
            assert!(rows(broken).is_err(), "{broken}");
        }
        let spoiled = text(&written).replace("us = 4.125", "us = 0.0");
        assert!(rows(&spoiled).unwrap_err().contains("row 1 of `NVIDIA"));
    }

    #[test]
    fn a_revision_is_of_the_code_alone() {
        let revision = |ptx: &str| revision(ptx, "gemv");
        let known = revision(PTX).expect("a kernel");
        let moved = PTX
            .replace("BB1_", "BB17_")
            .replace(" // a loop", "")
            .replace("\t.loc 1 2 3\n", "");
        assert_eq!(revision(&moved), Some(known));
        assert_ne!(revision(&PTX.replace("@%p1 bra", "@!%p1 bra")), Some(known));
        // Another loop of the same kernel.
        assert_ne!(
            revision(&PTX.replace("\t$L__BB1_1", "\t$L__BB1_2")),
            Some(known)
        );
        assert_eq!(super::revision(PTX, "gem"), None);
        // Of all whose names begin so.
        assert_eq!(super::revision(PTX, "gemv*"), Some(known));
        assert_eq!(super::revision(PTX, "gemm*"), None);
        let two = format!("{PTX}{}", PTX.replace("gemv(", "gemv_min("));
        assert_eq!(super::revision(&two, "gemv"), Some(known));
        let both = super::revision(&two, "gemv*").expect("two kernels");
        assert_ne!(both, known);
        let other = two.replace("gemv_min(", "gemv_other(");
        assert_ne!(super::revision(&other, "gemv*"), Some(both));
    }

    #[test]
    fn the_table_decides_where_it_holds_and_the_rule_elsewhere() {
        let current = revision(PTX, "gemv").expect("a kernel");
        let table = vec![measured("64x64", current), measured("64x96", current ^ 1)];
        let tuned = Tuned::among(table.clone(), "NVIDIA \"T4\"", 75, PTX);
        let rule = || Split {
            split: 1,
            blocks: 40,
        };
        let chosen = tuned.choose("gemv", "64x64", rule);
        assert_eq!((chosen.launch.split, chosen.launch.blocks), (14, 96));
        assert_eq!(chosen.to_string(), "split 14, blocks 96 (tuned)");
        for (shape, why) in [("64x96", Why::Outdated), ("64x128", Why::UnknownShape)] {
            let chosen = tuned.choose("gemv", shape, rule);
            assert_eq!((chosen.launch, chosen.why), (rule(), why));
        }
        let row = Row {
            launch: Split {
                split: 3,
                blocks: 5,
            }
            .named(),
            ..measured("64x96", current)
        };
        let chosen = tuned.with(row).choose("gemv", "64x96", rule);
        assert_eq!((chosen.launch.split, chosen.why), (3, Why::Tuned));
        for (gpu, tier) in [("NVIDIA H100", 75), ("NVIDIA \"T4\"", 80)] {
            let tuned = Tuned::among(table.clone(), gpu, tier, PTX);
            assert_eq!(tuned.choose("gemv", "64x64", rule).why, Why::UnknownGpu);
        }
    }

    #[test]
    fn numbers_that_make_no_launch_leave_the_rule() {
        let mut row = measured("64x64", revision(PTX, "gemv").expect("a kernel"));
        let rule = || Split {
            split: 1,
            blocks: 40,
        };
        for launch in [
            vec![("split".to_owned(), 14)],
            vec![("split".to_owned(), 0), ("blocks".to_owned(), 1)],
        ] {
            row.launch = launch;
            let tuned = Tuned::among(vec![row.clone()], "NVIDIA \"T4\"", 75, PTX);
            let chosen = tuned.choose("gemv", "64x64", rule);
            assert_eq!((chosen.launch, chosen.why), (rule(), Why::Outdated));
        }
    }
}
