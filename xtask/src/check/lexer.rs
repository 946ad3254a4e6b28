//! Splits Rust source into code and comments. Not a parser: it only knows where comments, strings
//! and character literals begin and end, so that a rule about code does not stumble over prose.

/// Returns `(code, comments)`, both with the line structure of `source`. In the code, comments and the
/// contents of literals are blanks; in the comments, everything else is.
pub(super) fn split(source: &str) -> (String, String) {
    let characters: Vec<char> = source.chars().collect();
    let mut lexer = Lexer {
        characters: &characters,
        at: 0,
        code: String::new(),
        comments: String::new(),
    };
    while lexer.at < characters.len() {
        lexer.token();
    }
    (lexer.code, lexer.comments)
}

struct Lexer<'a> {
    characters: &'a [char],
    at: usize,
    code: String,
    comments: String,
}

/// What a character belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

impl Lexer<'_> {
    fn peek(&self, offset: usize) -> Option<char> {
        self.characters.get(self.at + offset).copied()
    }

    fn starts_with(&self, text: &str) -> bool {
        text.chars()
            .enumerate()
            .all(|(offset, character)| self.peek(offset) == Some(character))
    }

    /// Consumes one character.
    fn take(&mut self, kind: Kind) {
        let Some(character) = self.peek(0) else {
            return;
        };
        self.at += 1;
        let blank = if character == '\n' { '\n' } else { ' ' };
        self.code
            .push(if kind == Kind::Code { character } else { blank });
        self.comments.push(if kind == Kind::Comment {
            character
        } else {
            blank
        });
    }

    fn take_many(&mut self, kind: Kind, count: usize) {
        for _ in 0..count {
            self.take(kind);
        }
    }

    fn token(&mut self) {
        if self.starts_with("//") {
            while self.peek(0).is_some_and(|character| character != '\n') {
                self.take(Kind::Comment);
            }
        } else if self.starts_with("/*") {
            self.block_comment();
        } else if let Some((prefix, hashes)) = self.raw_string() {
            self.take_many(Kind::Code, prefix);
            let end: String = std::iter::once('"')
                .chain(std::iter::repeat_n('#', hashes))
                .collect();
            while self.peek(0).is_some() && !self.starts_with(&end) {
                self.take(Kind::Literal);
            }
            self.take_many(Kind::Code, hashes + 1);
        } else if self.peek(0) == Some('"') {
            self.quoted('"');
        } else if self.is_character_literal() {
            self.quoted('\'');
        } else if self.peek(0).is_some_and(is_word) {
            // A whole word at once: the `r` of `for` opens no raw string.
            while self.peek(0).is_some_and(is_word) {
                self.take(Kind::Code);
            }
        } else {
            self.take(Kind::Code);
        }
    }

    /// Block comments nest.
    fn block_comment(&mut self) {
        let mut depth = 0;
        while self.peek(0).is_some() {
            if self.starts_with("/*") {
                depth += 1;
                self.take_many(Kind::Comment, 2);
            } else if self.starts_with("*/") {
                depth -= 1;
                self.take_many(Kind::Comment, 2);
                if depth == 0 {
                    return;
                }
            } else {
                self.take(Kind::Comment);
            }
        }
    }

    /// At the start of `r"`, `br#"` and the like: the length up to the quote included, and the number
    /// of hashes.
    fn raw_string(&self) -> Option<(usize, usize)> {
        let letters = ["r", "br", "cr"]
            .into_iter()
            .find(|letters| self.starts_with(letters))?
            .len();
        let mut hashes = 0;
        while self.peek(letters + hashes) == Some('#') {
            hashes += 1;
        }
        (self.peek(letters + hashes) == Some('"')).then_some((letters + hashes + 1, hashes))
    }

    /// `'a'` or `'\n'`, not the lifetime `'a`.
    fn is_character_literal(&self) -> bool {
        self.peek(0) == Some('\'') && (self.peek(1) == Some('\\') || self.peek(2) == Some('\''))
    }

    fn quoted(&mut self, quote: char) {
        self.take(Kind::Code);
        while let Some(character) = self.peek(0) {
            match character {
                '\\' => self.take_many(Kind::Literal, 2),
                _ if character == quote => return self.take(Kind::Code),
                _ => self.take(Kind::Literal),
            }
        }
    }
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// The words (identifiers, keywords, numbers) of some code with their lines, from 1.
pub(super) fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines().enumerate().flat_map(|(index, line)| {
        let words = line.split(|character| !is_word(character));
        words
            .filter(|word| !word.is_empty())
            .map(move |word| (index + 1, word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(source: &str) -> String {
        split(source).0
    }

    #[test]
    fn comments_and_strings_are_blanked() {
        assert_eq!(code("a // b\nc"), "a     \nc");
        assert_eq!(code("a /* b /* c */ d */ e"), "a                   e");
        assert_eq!(code(r#"f("x\"y", b"z") g"#), r#"f("    ", b" ") g"#);
        assert_eq!(code("r#\"a\"b\"# c"), "r#\"   \"# c");
        assert_eq!(code("for r in x"), "for r in x");
    }

    #[test]
    fn characters_are_told_from_lifetimes() {
        assert_eq!(
            code("fn f<'a>(x: &'a str) -> char { '\"' }"),
            "fn f<'a>(x: &'a str) -> char { ' ' }"
        );
        assert_eq!(code(r"'\'' // x"), "'  '     ");
    }

    #[test]
    fn comments_keep_their_lines() {
        let (code, comments) = split("let a = 1; // one\n\"// no\"\n");
        assert_eq!(comments.lines().next().unwrap().trim(), "// one");
        assert!(!comments.contains("no"));
        assert_eq!(code.lines().count(), 2);
    }

    #[test]
    fn open_ends_are_survived() {
        for source in ["/* a", "\"a", "r#\"a", "'\\", "'", "\"\\"] {
            assert_eq!(
                code(source).chars().count(),
                source.chars().count(),
                "{source}"
            );
        }
    }

    #[test]
    fn words_know_their_lines() {
        let found: Vec<_> = words("use std::fs;\nasm!()").collect();
        assert_eq!(found, [(1, "use"), (1, "std"), (1, "fs"), (2, "asm")]);
    }
}
