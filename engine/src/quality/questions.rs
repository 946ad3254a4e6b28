//! Multiple-choice questions made from a dictionary, to see that a changed model keeps its answers.
//!
//! The text is one of entries, as the Jargon File has them: a line `:term: pronunciation, kind.`, then
//! paragraphs in which `{braces}` refer to other entries. Two kinds of questions are made in turn:
//!
//! * definition: which of four definitions follows a term;
//! * reference: which of four terms stands where the text refers to one, read on to the end of the
//!   sentence.
//!
//! The wrong choices are definitions and references of other entries. The same text gives the same
//! questions.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::Error;

/// Choices of a question.
pub const CHOICES: usize = 4;
/// Characters of a definition: a shorter one says nothing, a longer one takes its time.
const DEFINITION_CHARS: std::ops::RangeInclusive<usize> = 60..=280;
/// Characters before a reference: enough to know what is spoken of, cut at the front.
const CONTEXT_CHARS: std::ops::RangeInclusive<usize> = 80..=480;
/// Characters from a reference to the end of its sentence.
const REST_CHARS: std::ops::RangeInclusive<usize> = 1..=120;

/// What a question asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The definition of a term.
    Definition,
    /// The term that a text refers to.
    Reference,
}

/// A text and what may follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What is asked for.
    pub kind: Kind,
    /// What is given; does not end in a space.
    pub prompt: String,
    /// What may follow, each beginning with a space.
    pub choices: [String; CHOICES],
    /// The right one.
    pub answer: usize,
}

/// An entry of the dictionary.
struct Entry {
    term: String,
    /// Paragraphs, each a line, references in braces.
    paragraphs: Vec<String>,
}

/// A reference inside an entry.
struct Link<'a> {
    entry: &'a Entry,
    before: &'a str,
    term: &'a str,
    rest: &'a str,
}

/// Makes `count` questions of `text`.
///
/// # Errors
/// [`Error::Input`] if the text does not hold entries enough.
pub fn questions(text: &str, count: usize) -> Result<Vec<Question>, Error> {
    let entries = entries(text);
    let definitions: Vec<(&Entry, String)> = entries
        .iter()
        .filter_map(|entry| Some((entry, definition(entry)?)))
        .collect();
    let links: Vec<Link<'_>> = entries.iter().flat_map(links).collect();
    let targets: Vec<&str> = links
        .iter()
        .map(|link| link.term)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let (of_terms, of_links) = (count.div_ceil(2), count / 2);
    if definitions.len() < of_terms.max(CHOICES)
        || links.len() < of_links
        || targets.len() < 2 * CHOICES
    {
        return Err(Error::Input(format!(
            "the text gives {} definitions and {} references for {count} questions: it has to be a dictionary like \
             the Jargon File, with lines `:term:`",
            definitions.len(),
            links.len()
        )));
    }

    let mut draw = Draw(0);
    let mut out = Vec::with_capacity(count);
    let spread = |at: usize, of: usize, all: usize| at * all / of.max(1);
    for at in 0..of_terms {
        let right = spread(at, of_terms, definitions.len());
        let (entry, definition) = &definitions[right];
        let wrong = draw.others(definitions.len(), |other| {
            let (_, text) = &definitions[other];
            other != right && !mentions(text, &entry.term)
        });
        let wrong = wrong.map(|other| format!(" {}", definitions[other].1));
        out.push(draw.question(
            Kind::Definition,
            format!(
                "In the slang of hackers, \u{201c}{}\u{201d} means:",
                entry.term
            ),
            format!(" {definition}"),
            wrong,
        ));
        if at < of_links {
            let link = &links[spread(at, of_links, links.len())];
            let known = [link.term.to_lowercase(), link.entry.term.to_lowercase()];
            let wrong = draw.others(targets.len(), |other| {
                !known.contains(&targets[other].to_lowercase())
            });
            let with_rest = |term: &str| format!(" {term}{}", link.rest);
            out.push(draw.question(
                Kind::Reference,
                format!("{}: {}", link.entry.term, link.before),
                with_rest(link.term),
                wrong.map(|other| with_rest(targets[other])),
            ));
        }
    }
    Ok(out)
}

/// A fixed sequence that looks random.
struct Draw(u64);

impl Draw {
    fn below(&mut self, bound: usize) -> usize {
        // Knuth's multiplier of 64 bits; the high bits are the good ones.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % bound as u64) as usize
    }

    /// Indices below `count`, different ones that `fits` takes if a few turns find them.
    fn others(&mut self, count: usize, fits: impl Fn(usize) -> bool) -> [usize; CHOICES - 1] {
        let mut found = Vec::new();
        for turn in 0.. {
            let at = self.below(count);
            let patient = turn < 64 * CHOICES;
            if !found.contains(&at) && (fits(at) || !patient) {
                found.push(at);
            }
            if let Ok(found) = <[usize; CHOICES - 1]>::try_from(&found[..]) {
                return found;
            }
        }
        unreachable!("there are more than enough to draw from")
    }

    fn question(
        &mut self,
        kind: Kind,
        prompt: String,
        right: String,
        wrong: [String; CHOICES - 1],
    ) -> Question {
        let answer = self.below(CHOICES);
        let mut choices = wrong.to_vec();
        choices.insert(answer, right);
        Question {
            kind,
            prompt,
            choices: choices.try_into().expect("one right, the others wrong"),
            answer,
        }
    }
}

/// The entries of a text, in order.
fn entries(text: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut open = false;
    for line in text.lines().map(str::trim) {
        let head = line
            .strip_prefix(':')
            .and_then(|line| line.split_once(": "));
        let head = head.or_else(|| Some((line.strip_prefix(':')?.strip_suffix(':')?, "")));
        match (head, entries.last_mut()) {
            (Some((term, _)), _) if !term.is_empty() && !term.contains(':') => {
                entries.push(Entry {
                    term: term.to_owned(),
                    paragraphs: Vec::new(),
                });
                open = false;
            }
            (_, Some(_)) if line.is_empty() => open = false,
            (_, Some(entry)) => match entry.paragraphs.last_mut() {
                Some(paragraph) if open => {
                    paragraph.push(' ');
                    paragraph.push_str(line);
                }
                _ => {
                    entry.paragraphs.push(line.to_owned());
                    open = true;
                }
            },
            (_, None) => {}
        }
    }
    entries
}

/// The first paragraph of an entry without notes in brackets, if it defines the term.
fn definition(entry: &Entry) -> Option<String> {
    let mut text = entry.paragraphs.first()?.as_str();
    while let Some(rest) = text.strip_prefix('[') {
        text = rest.split_once(']')?.1.trim_start();
    }
    let text: String = text
        .strip_prefix("1. ")
        .unwrap_or(text)
        .replace(['{', '}'], "");
    // A reference to another entry defines nothing, and a definition with the term gives it away.
    let elsewhere = ["See ", "Syn", "Same as", "Variant", "Alternate", "Common"];
    let fits = !elsewhere.iter().any(|start| text.starts_with(start))
        && is_word(&entry.term)
        && DEFINITION_CHARS.contains(&text.chars().count())
        && text.ends_with('.')
        && !mentions(&text, &entry.term);
    fits.then_some(text)
}

/// The references of an entry that have text before them and an end of sentence behind.
fn links(entry: &Entry) -> Vec<Link<'_>> {
    let mut links = Vec::new();
    for paragraph in &entry.paragraphs {
        for (at, _) in paragraph.match_indices(" {") {
            let Some((term, behind)) = paragraph[at + 2..].split_once('}') else {
                continue;
            };
            let Some(end) = behind
                .find(". ")
                .or_else(|| behind.strip_suffix('.').map(str::len))
            else {
                continue;
            };
            let before = last_chars(&paragraph[..at], *CONTEXT_CHARS.end());
            let rest = &behind[..=end];
            // A list of references could go on with any of them.
            let plain = |text: &str| !text.contains(['{', '}', '[', ']']);
            let listed = [
                "See", "see", "also", "Compare", "compare", "or", "and", "cf.",
            ];
            if plain(before)
                && plain(rest)
                && is_word(term)
                && !listed.iter().any(|word| before.ends_with(word))
                && CONTEXT_CHARS.contains(&before.chars().count())
                && REST_CHARS.contains(&rest.chars().count())
                && !mentions(before, term)
            {
                links.push(Link {
                    entry,
                    before,
                    term,
                    rest,
                });
                break;
            }
        }
    }
    links
}

/// The end of `text`, of at most `chars` characters.
fn last_chars(text: &str, chars: usize) -> &str {
    let start = text.char_indices().rev().take(chars).last();
    start.map_or("", |(at, _)| &text[at..])
}

/// Letters, with spaces or hyphens between them.
fn is_word(term: &str) -> bool {
    (3..=24).contains(&term.len())
        && term.starts_with(|c: char| c.is_ascii_alphabetic())
        && term
            .chars()
            .all(|c| c.is_ascii_alphabetic() || matches!(c, ' ' | '-'))
}

/// Whether `text` holds `term`, whatever the case.
fn mentions(text: &str, term: &str) -> bool {
    text.to_lowercase().contains(&term.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dictionary of `count` entries that refer to each other.
    fn dictionary(count: usize) -> String {
        let name = |i: usize| {
            let letter = |i: usize| char::from(b'a' + (i % 26) as u8);
            format!("{}{}{}word", letter(i / 676), letter(i / 26), letter(i))
        };
        let mut text = "A preface.\n\n".to_owned();
        for i in 0..count {
            let (other, third) = (name((i + 7) % count), name((i + 3) % count));
            text += &format!(
                "   :{}: /x/, n.\n\n   [common] A thing number {i} that people use when they have to talk about\n   \
                 what they would rather not, at length.\n\n   It happens a lot in the long evenings of winter, and \
                 when it does then everybody\n   calls for a {{{other}}} as soon as they can. See also {{{third}}}.\n\n",
                name(i)
            );
        }
        text
    }

    #[test]
    fn the_same_text_gives_the_same_questions() {
        let text = dictionary(40);
        let made = questions(&text, 21).expect("enough entries");
        assert_eq!(made, questions(&text, 21).expect("enough entries"));
        assert_eq!(made.len(), 21);
        let definitions = made.iter().filter(|q| q.kind == Kind::Definition).count();
        assert_eq!(definitions, 11);
        // The right one is not always in one place.
        let places: BTreeSet<usize> = made.iter().map(|q| q.answer).collect();
        assert!(places.len() > 2, "{places:?}");
    }

    #[test]
    fn the_right_choice_is_the_texts_and_the_others_are_not() {
        let made = questions(&dictionary(40), 20).expect("enough entries");
        let first = &made[0];
        assert_eq!(
            first.prompt,
            "In the slang of hackers, \u{201c}aaaword\u{201d} means:"
        );
        assert_eq!(
            first.choices[first.answer],
            " A thing number 0 that people use when they have to talk about what they would rather not, at length."
        );
        let second = &made[1];
        assert_eq!(
            second.prompt,
            "aaaword: It happens a lot in the long evenings of winter, and when it does then everybody calls for a"
        );
        assert_eq!(
            second.choices[second.answer],
            " aahword as soon as they can."
        );
        for question in &made {
            let choices: BTreeSet<&String> = question.choices.iter().collect();
            assert_eq!(choices.len(), CHOICES, "{question:?}");
        }
    }

    #[test]
    fn a_text_without_entries_is_an_input_error() {
        for text in ["", "Just a text.", &dictionary(3)] {
            assert_eq!(questions(text, 10).expect_err("too little").exit_code(), 2);
        }
    }
}
