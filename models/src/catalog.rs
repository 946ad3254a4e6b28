//! Known models and texts: where to get them, their size, hash and licence. Data from `catalog.toml`.

use serde::Deserialize;

use crate::Error;
use crate::error::shown;
use crate::hub_name::{self, HubName};

/// The catalog as it was when this crate was built.
const BUILTIN: &str = include_str!("../catalog.toml");

/// Models and texts by name; the first of each is the default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    /// The models in file order.
    #[serde(rename = "model")]
    pub models: Vec<Model>,
    /// The texts in file order.
    #[serde(rename = "text")]
    pub texts: Vec<Text>,
    /// Repositories of a model hub, in file order.
    #[serde(rename = "hub", default)]
    pub repositories: Vec<Repository>,
}

/// One known model.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Unique name: lower-case letters, digits, `.` and `-`.
    pub name: String,
    /// Other names for it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// File name under which it is kept; no path.
    pub file: String,
    /// Exact size.
    pub bytes: u64,
    /// Hash of the file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// SPDX licence id.
    pub licence: String,
    /// Architecture, as `general.architecture` spells it.
    pub architecture: String,
    /// Where it comes from.
    pub source: Source,
}

/// A known repository of a model hub. What it holds, how large and with which hashes, the hub says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repository {
    /// Unique name, among all entries.
    pub name: String,
    /// `OWNER/REPO`.
    pub repo: String,
    /// The one file that is meant; without it, whatever a model needs.
    #[serde(default)]
    pub file: Option<String>,
    /// SPDX licence id, or the licence's name where it has none.
    pub licence: String,
    /// Architecture, as [`crate::arch::ARCHITECTURES`] calls it.
    pub architecture: String,
}

impl Repository {
    /// The name by which it is pulled.
    ///
    /// # Errors
    /// A repository or file that no name can have; parsing a catalog refuses such an entry.
    pub fn hub_name(&self) -> Result<HubName, Error> {
        let file = self.file.iter().flat_map(|file| [":", file]);
        let name: String = [hub_name::PREFIX, &self.repo]
            .into_iter()
            .chain(file)
            .collect();
        name.parse()
    }
}

/// A known text, for calibration and measurement.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// Unique name, among those of the models too.
    pub name: String,
    /// File name under which it is kept; no path.
    pub file: String,
    /// Exact size.
    pub bytes: u64,
    /// Hash of the file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// What its terms are.
    pub licence: String,
    /// Where it comes from.
    pub source: TextSource,
}

/// Where a text comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum TextSource {
    /// A gzip-compressed file inside a Debian package.
    Debian {
        /// Package.
        package: String,
        /// Path inside the package.
        path: String,
    },
}

/// Where a model file comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A file inside a wheel of the Python package index.
    Pypi {
        /// Package.
        package: String,
        /// Exact version.
        version: String,
        /// Path inside the wheel.
        path: String,
    },
}

impl Catalog {
    /// The catalog that was built in.
    ///
    /// # Errors
    /// A malformed `catalog.toml`.
    pub fn builtin() -> Result<Catalog, Error> {
        Self::parse(BUILTIN)
    }

    /// Parses and checks a catalog.
    ///
    /// # Errors
    /// Malformed TOML, no models or texts, a name or alias used twice, a file name with a path in
    /// it, a hash that is not 64 hexadecimal digits, or a repository that is none.
    pub fn parse(text: &str) -> Result<Catalog, Error> {
        let fail = |reason: String| Error::Catalog { reason };
        let catalog: Catalog = toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map_or(0, |span| text[..span.start].matches('\n').count() + 1);
            fail(format!(
                "line {line}: {}",
                error.message().replace('\n', " ")
            ))
        })?;
        if catalog.models.is_empty() || catalog.texts.is_empty() {
            return Err(fail("it has no models or no texts".to_owned()));
        }
        let texts = catalog.texts.iter();
        let mut names: Vec<&str> = catalog.models.iter().flat_map(Model::names).collect();
        names.extend(texts.clone().map(|text| text.name.as_str()));
        for repository in &catalog.repositories {
            repository.hub_name()?;
            names.push(&repository.name);
        }
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(fail(format!("{} names two things", shown(pair[0]))));
        }
        let models = catalog.models.iter();
        let files = models
            .map(|model| (&model.name, &model.file, &model.sha256))
            .chain(texts.map(|text| (&text.name, &text.file, &text.sha256)));
        for (name, file, sha256) in files {
            if file.is_empty() || file.contains(['/', '\\']) || file == ".." {
                return Err(fail(format!(
                    "file {} is not a plain file name",
                    shown(file)
                )));
            }
            let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            if sha256.len() != 64 || !sha256.bytes().all(is_hex) {
                return Err(fail(format!("sha256 of {} is malformed", shown(name))));
            }
        }
        Ok(catalog)
    }

    /// The model that runs when none is named.
    pub fn default_model(&self) -> &Model {
        // Parsing refuses an empty catalog.
        &self.models[0]
    }

    /// The text that is read when none is named.
    pub fn default_text(&self) -> &Text {
        // Parsing refuses a catalog without.
        &self.texts[0]
    }

    /// The repository with this name, whatever the case.
    pub fn repository(&self, name: &str) -> Option<&Repository> {
        let mut repositories = self.repositories.iter();
        repositories.find(|known| known.name.eq_ignore_ascii_case(name))
    }

    /// Finds a model by name or alias, whatever the case.
    ///
    /// # Errors
    /// An unknown name; the message lists the known ones.
    pub fn find(&self, name: &str) -> Result<&Model, Error> {
        let is_named = |model: &&Model| model.names().any(|n| n.eq_ignore_ascii_case(name));
        self.models
            .iter()
            .find(is_named)
            .ok_or_else(|| Error::UnknownName {
                what: "model",
                found: shown(name),
                known: self
                    .models
                    .iter()
                    .map(|m| m.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }
}

impl Model {
    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.name)
            .chain(&self.aliases)
            .map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builtin_names_the_default_model() {
        let catalog = Catalog::builtin().unwrap();
        let model = catalog.find("SmolLM2-135M-Instruct").unwrap();
        assert_eq!(catalog.default_model(), model);
        assert_eq!(
            (model.bytes, model.architecture.as_str()),
            (98_362_432, "llama")
        );
        let models = catalog.models.iter().map(|model| &model.architecture);
        let repositories = catalog.repositories.iter();
        for architecture in models.chain(repositories.clone().map(|known| &known.architecture)) {
            let known = crate::arch::ARCHITECTURES
                .iter()
                .any(|a| a.name == architecture);
            assert!(known, "{architecture} has no recipe");
        }
        for known in repositories {
            assert_eq!(catalog.repository(&known.name.to_uppercase()), Some(known));
        }
    }

    #[test]
    fn unknown_names_list_the_known() {
        let error = Catalog::builtin()
            .unwrap()
            .find("gpt-5\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("unknown model `gpt-5\\n`: known are smollm2"),
            "{error}"
        );
    }

    #[test]
    fn malformed_catalogs_are_refused() {
        for (from, to, expect) in [
            ("bytes = ", "byte = ", "unknown field `byte`"),
            ("file = \"", "file = \"../", "not a plain file name"),
            ("sha256 = \"b", "sha256 = \"", "sha256"),
            ("kind = \"pypi\"", "kind = \"ftp\"", "unknown variant `ftp`"),
            ("repo = \"Qwen/", "repo = \"../Qwen/", "names no repository"),
            (
                "aliases = [",
                "aliases = [\"smollm2-135m-instruct\", ",
                "names two things",
            ),
        ] {
            assert!(BUILTIN.contains(from), "{from}");
            let error = Catalog::parse(&BUILTIN.replacen(from, to, 1))
                .unwrap_err()
                .to_string();
            assert!(error.contains(expect) && !error.contains('\n'), "{error}");
        }
        assert!(Catalog::parse("model = []\ntext = []").is_err());
    }
}
