//! Forms of ternary weights that `cargo xtask tune --cpu` found fastest for one token, by CPU, instruction set,
//! shape and threads: `cpu-kernels/tuned.toml`. Where no row holds, a rule decides.

use std::fmt;

use toml::{Table, Value};

use crate::isa::{Isa, Kind};
use crate::linear::ternary::Form;

/// Environment variable that forces a form: one of the names of [`Form`].
pub const OVERRIDE: &str = "EDGELLM_CPU_TERNARY";

/// The table as it is checked in.
const TABLE: &str = include_str!("../tuned.toml");

/// A measured form.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Model name of the CPU.
    pub cpu: String,
    /// Instruction set.
    pub isa: String,
    /// N and K, as in `2560x6912`.
    pub shape: String,
    /// Threads that shared the rows out.
    pub threads: usize,
    /// The fastest form.
    pub form: Form,
    /// Microseconds that it took.
    pub us: f64,
    /// Microseconds that the rule's form took, in the same run.
    pub rule_us: f64,
}

impl Row {
    /// Whether both are of the same CPU, instruction set, shape and threads: the later one replaces the other.
    pub fn replaces(&self, other: &Row) -> bool {
        let key = |row: &Row| {
            (
                row.cpu.clone(),
                row.isa.clone(),
                row.shape.clone(),
                row.threads,
            )
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
    for (cpu, list) in &table {
        let list = list
            .as_array()
            .ok_or_else(|| format!("`{cpu}` is no list of rows"))?;
        for (number, value) in list.iter().enumerate() {
            let row = row(cpu, value)
                .map_err(|reason| format!("row {} of `{cpu}`: {reason}", number + 1))?;
            rows.push(row);
        }
    }
    Ok(rows)
}

fn row(cpu: &str, value: &Value) -> Result<Row, String> {
    let text = |name: &str| {
        let found = value.get(name).and_then(Value::as_str);
        found.ok_or_else(|| format!("`{name}` is no text"))
    };
    let us = |name: &str| {
        let found = value.get(name).and_then(Value::as_float);
        let found = found.filter(|us| us.is_finite() && *us > 0.0);
        found.ok_or_else(|| format!("`{name}` is no time"))
    };
    let threads = value.get("threads").and_then(Value::as_integer);
    let threads = threads.and_then(|n| usize::try_from(n).ok());
    Ok(Row {
        cpu: cpu.to_owned(),
        isa: text("isa")?.to_owned(),
        shape: text("shape")?.to_owned(),
        threads: threads.ok_or("`threads` is no number")?,
        form: Form::named(text("form")?)?,
        us: us("us")?,
        rule_us: us("rule_us")?,
    })
}

/// Writes a table, a line a row: what [`rows`] reads.
pub fn text(rows: &[Row]) -> String {
    let mut rows: Vec<&Row> = rows.iter().collect();
    rows.sort_by_key(|row| (&row.cpu, &row.isa, &row.shape, row.threads));
    let quoted = |text: &str| Value::from(text).to_string();
    let mut text = String::from(
        "# Forms of ternary weights that `cargo xtask tune --cpu` found fastest for one token.\n\
         # `rule_us`: what the rule's form took.\n",
    );
    for cpu in rows.chunk_by(|a, b| a.cpu == b.cpu) {
        text.push_str(&format!("\n{} = [\n", quoted(&cpu[0].cpu)));
        for row in cpu {
            text.push_str(&format!(
                "    {{ isa = {}, shape = {}, threads = {}, form = {}, us = {:.1}, rule_us = {:.1} }},\n",
                quoted(&row.isa),
                quoted(&row.shape),
                row.threads,
                quoted(row.form.name()),
                row.us,
                row.rule_us,
            ));
        }
        text.push_str("]\n");
    }
    text
}

/// What a matrix is laid out as where nothing was measured: five weights a byte where they are taken apart by
/// instructions, as reading decides a single token; else two bits, multiplied.
pub fn rule(isa: Isa) -> Form {
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512Vbmi => Form::Fives,
        // Without `sdot` a product of bytes takes as many instructions as two look-ups, and covers half as much.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => Form::LookUp,
        _ => Form::Multiply,
    }
}

/// The forms that `isa` has instructions for.
pub fn candidates(isa: Isa) -> &'static [Form] {
    match isa.0 {
        Kind::Scalar => &[Form::Multiply],
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512Vbmi => &Form::ALL,
        _ => &[Form::Multiply, Form::LookUp],
    }
}

/// A form, and why it is this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// The form.
    pub form: Form,
    /// Where it comes from.
    pub why: Why,
}

/// Where a form comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The environment.
    Forced,
    /// The table.
    Tuned,
    /// The rule, as this CPU and instruction set are not in the table.
    UnknownCpu,
    /// The rule, as this shape is not in the table.
    UnknownShape,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Forced => write!(f, "set by {OVERRIDE}"),
            Why::Tuned => f.write_str("tuned"),
            Why::UnknownCpu => f.write_str("rule: nothing is tuned for this CPU"),
            Why::UnknownShape => f.write_str("rule: this shape is not tuned"),
        }
    }
}

/// Chooses for one CPU, instruction set and number of threads.
#[derive(Debug, Clone)]
pub struct Tuned {
    forced: Option<Form>,
    rule: Form,
    rows: Vec<Row>,
    threads: usize,
}

impl Tuned {
    /// The checked-in rows of the CPU named `cpu`, or the form that [`OVERRIDE`] names.
    ///
    /// # Errors
    /// If the variable names no form.
    pub fn load(cpu: &str, isa: Isa, threads: usize) -> Result<Tuned, String> {
        let forced = match std::env::var(OVERRIDE) {
            Ok(name) => Some(Form::named(&name).map_err(|e| format!("{OVERRIDE}: {e}"))?),
            Err(_) => None,
        };
        Ok(Tuned::among(checked_in(), forced, cpu, isa, threads))
    }

    /// One form for every shape.
    pub fn forced(form: Form) -> Tuned {
        Tuned {
            forced: Some(form),
            rule: form,
            rows: Vec::new(),
            threads: 1,
        }
    }

    fn among(rows: Vec<Row>, forced: Option<Form>, cpu: &str, isa: Isa, threads: usize) -> Tuned {
        let mut rows = rows;
        rows.retain(|row| row.cpu == cpu && row.isa == isa.name());
        Tuned {
            forced,
            rule: rule(isa),
            rows,
            threads,
        }
    }

    /// The form of an `(n, k)` matrix: of the row whose number of threads is nearest.
    pub fn choose(&self, n: usize, k: usize) -> Chosen {
        if let Some(form) = self.forced {
            return Chosen {
                form,
                why: Why::Forced,
            };
        }
        let shape = format!("{n}x{k}");
        let same = self.rows.iter().filter(|row| row.shape == shape);
        match same.min_by_key(|row| (row.threads.abs_diff(self.threads), row.threads)) {
            Some(row) => Chosen {
                form: row.form,
                why: Why::Tuned,
            },
            None => Chosen {
                form: self.rule,
                why: match self.rows.is_empty() {
                    true => Why::UnknownCpu,
                    false => Why::UnknownShape,
                },
            },
        }
    }

    /// The shapes with rows and what is chosen for them, then what any other matrix gets.
    pub fn choices(&self) -> Vec<(String, Chosen)> {
        let mut shapes: Vec<&str> = self.rows.iter().map(|row| row.shape.as_str()).collect();
        shapes.sort_unstable();
        shapes.dedup();
        let of = |shape: &str| {
            let (n, k) = shape.split_once('x')?;
            Some((
                shape.to_owned(),
                self.choose(n.parse().ok()?, k.parse().ok()?),
            ))
        };
        let mut all: Vec<_> = match self.forced {
            Some(_) => Vec::new(),
            None => shapes.into_iter().filter_map(of).collect(),
        };
        // No matrix has no rows.
        all.push(("other shapes".to_owned(), self.choose(0, 0)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cpu: &str, isa: &str, shape: &str, threads: usize, form: Form) -> Row {
        Row {
            cpu: cpu.to_owned(),
            isa: isa.to_owned(),
            shape: shape.to_owned(),
            threads,
            form,
            us: 10.5,
            rule_us: 12.0,
        }
    }

    #[test]
    fn the_table_that_is_checked_in_can_be_read_and_stays_the_same_text() {
        assert_eq!(text(&rows(TABLE).unwrap()), TABLE);
    }

    #[test]
    fn what_is_no_row_is_named() {
        let error = rows(
            "\"A\" = [{ isa = \"avx2\", shape = \"1x32\", threads = 1, form = \"guess\", us = 1.0, rule_us = 1.0 }]",
        );
        let error = error.unwrap_err();
        assert!(
            error.contains("row 1 of `A`") && error.contains("lookup"),
            "{error}"
        );
        assert!(rows("\"A\" = 1").unwrap_err().contains("`A`"));
    }

    #[test]
    fn the_nearest_number_of_threads_decides_and_the_environment_before_it() {
        let isa = Isa::available()[0];
        let table = vec![
            row("A", "scalar", "64x32", 1, Form::LookUp),
            row("A", "scalar", "64x32", 8, Form::Fives),
            row("B", "scalar", "64x64", 1, Form::LookUp),
            row("A", "other", "64x64", 1, Form::LookUp),
        ];
        let of = |forced, cpu: &str, threads, n, k| {
            Tuned::among(table.clone(), forced, cpu, isa, threads).choose(n, k)
        };
        let chosen = |form, why| Chosen { form, why };
        assert_eq!(of(None, "A", 2, 64, 32), chosen(Form::LookUp, Why::Tuned));
        assert_eq!(of(None, "A", 6, 64, 32), chosen(Form::Fives, Why::Tuned));
        assert_eq!(
            of(None, "A", 1, 64, 64),
            chosen(Form::Multiply, Why::UnknownShape)
        );
        assert_eq!(
            of(None, "C", 1, 64, 64),
            chosen(Form::Multiply, Why::UnknownCpu)
        );
        let forced = of(Some(Form::LookUp), "A", 6, 64, 32);
        assert_eq!(forced, chosen(Form::LookUp, Why::Forced));
        let choices = Tuned::among(table.clone(), None, "A", isa, 1).choices();
        assert_eq!(choices.len(), 2, "{choices:?}");
        assert_eq!(choices[0].0, "64x32");
    }

    #[test]
    fn the_rule_has_instructions() {
        for isa in Isa::available() {
            assert!(candidates(isa).contains(&rule(isa)), "{isa}");
        }
    }
}
