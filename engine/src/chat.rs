//! Chat templates: the Jinja program in a model file turns messages into the prompt's text.
//!
//! Rendered as `transformers` does: blocks trimmed, `raise_exception`, `strftime_now` and Python's
//! string methods at hand. A template comes from a file, so its steps and output are limited.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde::Serialize;

use crate::Error;

/// Virtual-machine steps a template may take.
const FUEL_STEPS: u64 = 5_000_000;
/// Bytes a template may write.
const OUTPUT_LIMIT_BYTES: usize = 64 << 20;
/// Name of the template inside its environment.
const NAME: &str = "chat";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles `source`. `bos_token` and `eos_token` are the texts of those tokens, empty where
    /// the vocabulary has none.
    ///
    /// # Errors
    /// [`Error::Input`] if the template is not valid Jinja.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL_STEPS));
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(Error::machine)?,
        );
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        // A prompt is text, not HTML.
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| Error::Input(format!("chat template: {}", describe(&e))))?;
        Ok(Self {
            environment,
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// The prompt for `messages`, ready for the assistant's answer.
    ///
    /// # Errors
    /// [`Error::Input`] if the template refuses the messages, fails or exceeds its limits.
    pub fn render(&self, messages: &[Message]) -> Result<String, Error> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(Error::machine)?;
        let mut out = LimitedBuffer::default();
        template
            .render_captured_to(
                minijinja::context! {
                    messages => Serde(messages),
                    add_generation_prompt => true,
                    bos_token => &self.bos_token,
                    eos_token => &self.eos_token,
                },
                &mut out,
            )
            .map_err(|e| match out.full {
                true => Error::Input(format!(
                    "chat template writes more than {OUTPUT_LIMIT_BYTES} bytes"
                )),
                false => Error::Input(format!("chat template: {}", describe(&e))),
            })?;
        String::from_utf8(out.bytes).map_err(Error::machine)
    }
}

/// Output of a template, up to [`OUTPUT_LIMIT_BYTES`].
#[derive(Debug, Default)]
struct LimitedBuffer {
    bytes: Vec<u8>,
    full: bool,
}

impl std::io::Write for LimitedBuffer {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + data.len() > OUTPUT_LIMIT_BYTES {
            self.full = true;
            return Err(std::io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A template error as one line.
fn describe(error: &minijinja::Error) -> String {
    let what = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

/// `raise_exception(message)`: the template refuses the conversation.
fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `tojson` as `transformers` defines it: Python's `json.dumps` without HTML or ASCII escapes.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let fail = |e: &dyn std::fmt::Display| {
        minijinja::Error::new(ErrorKind::BadSerialization, e.to_string())
    };
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
            value.serialize(&mut serializer).map_err(|e| fail(&e))?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonSpacing);
            value.serialize(&mut serializer).map_err(|e| fail(&e))?;
        }
    }
    String::from_utf8(out).map_err(|e| fail(&e))
}

/// `json.dumps` separators: `", "` and `": "`.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `strftime_now(format)`: the current date and time, UTC.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    strftime(format, seconds).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))
}

const WEEKDAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// C's `strftime` in the C locale for `seconds` after 1970-01-01T00:00Z.
fn strftime(format: &str, seconds: u64) -> Result<String, String> {
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day, day_of_year) = civil_date(days);
    let weekday = WEEKDAYS[((days + 4) % 7) as usize]; // 1970-01-01 was a Thursday
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let number = |value: u64, width: usize| match padded {
            true => format!("{value:0width$}"),
            false => value.to_string(),
        };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('B') => month_name.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let name = other.map(String::from).unwrap_or_default();
                return Err(format!("strftime_now: directive %{name} is not supported"));
            }
        });
    }
    Ok(out)
}

/// Year, month 1..=12, day 1..=31 and day of the year 1..=366 of a day counted from 1970-01-01.
fn civil_date(mut days: u64) -> (u64, u64, u64, u64) {
    let leap = |y: u64| (y.is_multiple_of(4) && !y.is_multiple_of(100)) || y.is_multiple_of(400);
    // 400 years always have 146 097 days.
    let mut year = 1970 + 400 * (days / 146_097);
    days %= 146_097;
    while days >= 365 + leap(year) as u64 {
        days -= 365 + leap(year) as u64;
        year += 1;
    }
    let day_of_year = days + 1;
    let mut month = 1;
    for length in [
        31,
        28 + leap(year) as u64,
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(messages)
    }

    fn hello() -> Vec<Message> {
        vec![Message::new("user", " Hi <b> ")]
    }

    #[test]
    fn messages_are_rendered_without_escaping() {
        let source = "{{ bos_token }}{% for m in messages %}\n[{{ m.role }}]{{ m['content'].strip() }}{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}[assistant]{% endif %}";
        assert_eq!(
            render(source, &hello()).unwrap(),
            "<s>[user]Hi <b></s>\n[assistant]"
        );
    }

    #[test]
    fn python_methods_and_loop_controls_work() {
        let source = "{% for m in messages %}{% if m.content.strip().startswith('Hi') and 'b>' in m.content %}{{ m.content.split('<')[-1].upper() }}{% break %}{% endif %}{% endfor %}{{ {'a': 1}.items()|list|length }}";
        assert_eq!(render(source, &hello()).unwrap(), "B> 1");
    }

    #[test]
    fn tojson_has_python_spacing_and_keeps_order() {
        let source = "{{ {'b': [1, 2], 'a': 'é<'} | tojson }}";
        assert_eq!(render(source, &[]).unwrap(), r#"{"b": [1, 2], "a": "é<"}"#);
        let source = "{{ {'b': 1} | tojson(indent=2) }}";
        assert_eq!(render(source, &[]).unwrap(), "{\n  \"b\": 1\n}");
    }

    #[test]
    fn refusals_and_broken_templates_are_input_errors() {
        let cases = [
            (
                "{{ raise_exception('roles must alternate') }}",
                "roles must alternate",
            ),
            ("{% for m in messages %}", "chat template"),
            ("{{ strftime_now('%Q') }}", "%Q"),
            ("{{ messages.nothing() }}", "chat template"),
        ];
        for (source, expected) in cases {
            let error = render(source, &hello()).expect_err(source);
            assert_eq!(error.exit_code(), 2);
            let message = error.to_string();
            assert!(message.contains(expected), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn endless_templates_run_out_of_fuel_or_space() {
        let error = render(
            "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
            &[],
        )
        .expect_err("out of fuel");
        assert!(error.to_string().contains("fuel"), "{error}");
        let error = render(
            "{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}",
            &[Message::new("user", "x".repeat(1 << 20))],
        )
        .expect_err("too much output");
        assert!(error.to_string().contains("bytes"), "{error}");
    }

    #[test]
    fn dates_match_known_days() {
        let cases = [
            (0, "1970-01-01 Thu 001 00:00:00"),
            (951_782_399, "2000-02-28 Mon 059 23:59:59"),
            (951_782_400, "2000-02-29 Tue 060 00:00:00"),
            (1_735_689_599, "2024-12-31 Tue 366 23:59:59"),
            (4_107_542_400, "2100-03-01 Mon 060 00:00:00"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(strftime("%F %a %j %T", seconds).unwrap(), expected);
        }
        assert_eq!(
            strftime("%d %b %Y, %-d %B %y %I %p %%", 1_720_000_000).unwrap(),
            "03 Jul 2024, 3 July 24 09 AM %"
        );
    }
}
