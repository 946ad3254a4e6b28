//! Model hubs that speak Hugging Face's routes: what a repository holds, and its files.
//!
//! The `hf-hub` crate tells the endpoint and the stored token. Its transfers are not used: 0.5 adds
//! whatever a server sends to a file that was cut off and compares no hash, 1.0 starts over after a cut
//! and brings 280 crates. What is here asks `ureq`, which `hf-hub` brings along, goes on where a
//! transfer was cut, and keeps nothing whose hash is wrong.

mod request;
mod transfer;

use std::env;

use hf_hub::Cache;
use hf_hub::api::sync::ApiBuilder;
use models::hub_name::{HubName, is_safe_path};
use serde::Deserialize;
use ureq::Agent;

use crate::Error;
use crate::error::shown;

pub use transfer::{Fetched, sha256_of};

/// A hub and the right to ask it.
pub struct Hub {
    agent: Agent,
    /// Scheme, host and port, without a final slash.
    endpoint: String,
    token: Option<String>,
}

/// What a repository holds at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Commit id.
    pub commit: String,
    /// Paths of its files; not to be trusted as paths of this machine.
    files: Vec<String>,
}

/// Small files of a model that the engine reads, if they are there.
const SMALL_FILES: [&str; 6] = [
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

impl Hub {
    /// The hub that `HF_ENDPOINT` names, or the public one, with the token of `HF_TOKEN` or the one
    /// stored under `HF_HOME`.
    ///
    /// # Errors
    /// [`Error::Machine`] if the client cannot be set up.
    pub fn from_environment() -> Result<Self, Error> {
        let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let api = ApiBuilder::from_env().build().map_err(Error::machine)?;
        // The crate gives no endpoint, but addresses that begin with it.
        let url = api.model("o/r".to_owned()).url("f");
        let endpoint = url
            .strip_suffix("/o/r/resolve/main/f")
            .ok_or_else(|| Error::machine(format!("hf-hub's addresses have changed: {url}")))?;
        Ok(Self {
            agent: request::agent(),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: variable("HF_TOKEN").or_else(|| Cache::from_env().token()),
        })
    }

    /// What `name`'s repository holds at its revision.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no such repository or revision or it may not be read,
    /// [`Error::Machine`] if the hub cannot be reached or talks nonsense.
    pub fn listing(&self, name: &HubName) -> Result<Listing, Error> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let HubName { repo, revision, .. } = name;
        let url = format!("{}/api/models/{repo}/revision/{revision}", self.endpoint);
        let answer: Answer = self.json(&url, &format!("{repo} at {revision}"))?;
        // The commit becomes part of addresses.
        if !is_safe_path(&answer.sha) || answer.sha.contains('/') {
            return Err(Error::machine(format!(
                "the hub calls the commit of {repo} {}",
                shown(&answer.sha)
            )));
        }
        let files = answer.siblings.into_iter();
        Ok(Listing {
            commit: answer.sha,
            files: files.map(|file| file.rfilename).collect(),
        })
    }
}

impl Listing {
    /// The files that `name` means: its own, or else the safetensors files in the root of the
    /// repository with what belongs to them, or else its only GGUF file.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no such file, no model, a choice to make, or a name that leads out
    /// of the folder.
    pub fn wanted(&self, name: &HubName) -> Result<Vec<&str>, Error> {
        let repo = &name.repo;
        let files = || self.files.iter().map(String::as_str);
        let ggufs: Vec<&str> = files().filter(|file| file.ends_with(".gguf")).collect();
        // A second copy of the weights in another layout.
        let copy = |file: &str| file.starts_with("consolidated");
        let tensors = |file: &&str| file.ends_with(".safetensors") && !copy(file);
        let wanted: Vec<&str> = match &name.file {
            Some(file) => files().filter(|known| known == file).collect(),
            None if files().any(|file| tensors(&file) && !file.contains('/')) => files()
                .filter(|file| SMALL_FILES.contains(file) || tensors(file))
                .filter(|file| !file.contains('/') || file.contains(".."))
                .collect(),
            None if ggufs.len() > 1 => {
                let choices: Vec<String> = ggufs.iter().map(|file| shown(file)).collect();
                return Err(Error::Input(format!(
                    "{repo} has several GGUF files, choose one with hf:{repo}:FILE: {}",
                    choices.join(", ")
                )));
            }
            None => ggufs.clone(),
        };
        if let Some(file) = wanted.iter().find(|file| !is_safe_path(file)) {
            return Err(Error::Input(format!(
                "{repo} has a file named {}, which is no name for a file here",
                shown(file)
            )));
        }
        match (wanted.is_empty(), &name.file) {
            (false, _) => Ok(wanted),
            (true, Some(file)) => {
                let known: Vec<String> = ggufs.iter().map(|file| shown(file)).collect();
                Err(Error::Input(format!(
                    "{repo} has no file {file}; its GGUF files: {}",
                    match known.is_empty() {
                        true => "none".to_owned(),
                        false => known.join(", "),
                    }
                )))
            }
            (true, None) => Err(Error::Input(format!(
                "{repo} has neither safetensors nor GGUF files"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(files: &[&str], name: &str) -> Result<Vec<String>, Error> {
        let listing = Listing {
            commit: "c".to_owned(),
            files: files.iter().map(|file| (*file).to_owned()).collect(),
        };
        let name: HubName = name.parse().expect("a name");
        let wanted = listing.wanted(&name)?;
        Ok(wanted.into_iter().map(str::to_owned).collect())
    }

    #[test]
    fn a_model_is_its_tensors_and_what_belongs_to_them() {
        let files = [
            ".gitattributes",
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.onnx",
            "original/params.safetensors",
            "tokenizer.json",
        ];
        let expected = [files[2], files[4], files[5], files[6], files[9]];
        assert_eq!(wanted(&files, "hf:o/r").expect("a model"), expected);
        assert_eq!(
            wanted(&files, "hf:o/r:README.md").expect("a file"),
            ["README.md"]
        );
    }

    #[test]
    fn one_gguf_file_is_the_model_and_several_are_a_choice() {
        assert_eq!(wanted(&["m.gguf", "x"], "hf:o/r").expect("one"), ["m.gguf"]);
        let two = ["q4.gguf", "q8/m.gguf"];
        let error = wanted(&two, "hf:o/r").expect_err("a choice");
        assert!(
            error.to_string().contains("`q4.gguf`, `q8/m.gguf`")
                || error.to_string().contains("q4.gguf, q8/m.gguf"),
            "{error}"
        );
        assert_eq!(
            wanted(&two, "hf:o/r:q8/m.gguf").expect("named"),
            ["q8/m.gguf"]
        );
        for (files, name) in [(&["x"][..], "hf:o/r"), (&two, "hf:o/r:q5.gguf")] {
            assert_eq!(wanted(files, name).expect_err("none").exit_code(), 2);
        }
    }

    #[test]
    fn files_that_lead_out_of_the_folder_are_refused() {
        for evil in [
            "../e.safetensors",
            "a\\..\\e.safetensors",
            ".e.safetensors",
            "e\n.safetensors",
        ] {
            let error = wanted(&["model.safetensors", evil], "hf:o/r").expect_err(evil);
            assert!(error.to_string().contains("no name for a file"), "{error}");
        }
        assert!(wanted(&["/etc/m.gguf"], "hf:o/r").is_err());
    }
}
