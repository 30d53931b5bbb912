//! Where the hub is, where its cache is, and the token: from the environment, by the names and rules of
//! Python's huggingface_hub (constants.py, utils/_auth.py).

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use reqwest::Url;
use reqwest::header::HeaderValue;

use super::FetchError;
use crate::hub::folder::free_bytes;
use crate::hub::place::{Environment, token_file};

const ENDPOINT: &str = "https://huggingface.co";

/// Words that mean yes in a variable.
const YES: [&str; 4] = ["1", "ON", "YES", "TRUE"];

/// The `Authorization` header. Its text is in no log, message or debug output.
#[derive(Clone)]
pub(super) struct Token(pub(super) HeaderValue);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// Settings of downloads.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// The Hugging Face cache: the folder that holds `models--owner--name`.
    pub cache: PathBuf,
    pub(super) endpoint: Url,
    pub(super) token: Option<Token>,
    pub(super) offline: bool,
    /// Connections at one time.
    pub connections: usize,
    /// Returns the bytes free on the disk of a folder.
    pub(super) free_bytes: fn(&Path) -> io::Result<u64>,
}

impl HubSettings {
    /// Connections of a download at one time, unless it says otherwise.
    pub const CONNECTIONS: u8 = 8;

    /// Reads the environment: `HF_ENDPOINT`; `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`; `HF_TOKEN`,
    /// `HUGGING_FACE_HUB_TOKEN`, `HF_HUB_DISABLE_IMPLICIT_TOKEN`. Without a token it reads that of a file,
    /// which `HF_TOKEN_PATH`, `HF_HOME`, `XDG_CACHE_HOME` or `HOME` names.
    ///
    /// # Errors
    /// `Setting` for an endpoint that is not an address, or a token that cannot be sent.
    pub fn from_environment(cache: PathBuf) -> Result<Self, FetchError> {
        Self::from_variables(cache, &|name| std::env::var(name).ok().filter(|text| !text.is_empty()))
    }

    pub(super) fn from_variables(cache: PathBuf, env: &Environment<'_>) -> Result<Self, FetchError> {
        let is_set = |name: &str| env(name).is_some_and(|text| YES.contains(&text.to_uppercase().as_str()));
        let endpoint = env("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let not_an_address = |why: &str| FetchError::Setting { variable: "HF_ENDPOINT", why: why.to_owned() };
        let url =
            Url::parse(endpoint.trim_end_matches('/')).map_err(|error| not_an_address(&error.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(not_an_address("must be an http or https address"));
        }
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
            return Err(not_an_address("must have no name, password or query"));
        }
        let token = if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { token(env)? };
        Ok(Self {
            cache,
            endpoint: url,
            token,
            offline: is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"),
            connections: Self::CONNECTIONS.into(),
            free_bytes,
        })
    }
}

fn token(env: &Environment<'_>) -> Result<Option<Token>, FetchError> {
    let given = |variable| env(variable).map(|text| (variable, text));
    let found = match given("HF_TOKEN").or_else(|| given("HUGGING_FACE_HUB_TOKEN")) {
        Some(found) => Some(found),
        None => stored_token(env)?,
    };
    let Some((source, text)) = found else { return Ok(None) };
    let text: String = text.replace(['\r', '\n'], "").trim().to_owned();
    if text.is_empty() {
        return Ok(None);
    }
    let why = "has characters that cannot be sent";
    let value = HeaderValue::from_str(&format!("Bearer {text}"));
    let mut value = value.map_err(|_| FetchError::Setting { variable: source, why: why.into() })?;
    value.set_sensitive(true);
    Ok(Some(Token(value)))
}

/// Returns the token of the file that `hf auth login` writes, if there is one.
fn stored_token(env: &Environment<'_>) -> Result<Option<(&'static str, String)>, FetchError> {
    const FILE: &str = "the token's file";
    let Some(path) = token_file(env) else { return Ok(None) };
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some((FILE, text))),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(FetchError::Setting { variable: FILE, why: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<HubSettings, FetchError> {
        let env = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, text)| (*text).to_owned())
        };
        HubSettings::from_variables("/cache".into(), &env)
    }

    fn sent(settings: &HubSettings) -> Option<&str> {
        settings.token.as_ref().map(|token| token.0.to_str().unwrap())
    }

    #[test]
    fn the_token_is_the_variables_else_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        assert_eq!(sent(&read(&[("HF_HOME", home)]).unwrap()), None);
        fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(sent(&read(&[("HF_HOME", home)]).unwrap()), Some("Bearer hf_file"));
        assert_eq!(sent(&read(&[("HF_HOME", home), ("HF_TOKEN", "hf_env")]).unwrap()), Some("Bearer hf_env"));
        let off = [("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
        assert_eq!(sent(&read(&off).unwrap()), None);
        let path = folder.path().join("token");
        let path = [("HF_TOKEN_PATH", path.to_str().unwrap())];
        assert_eq!(sent(&read(&path).unwrap()), Some("Bearer hf_file"));
    }

    #[test]
    fn the_tokens_file_is_found_by_the_rules_of_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        for (at, variable) in [
            ("a", ("HF_TOKEN_PATH", "~/a")),
            ("b/token", ("HF_HOME", "~/b")),
            ("c/huggingface/token", ("XDG_CACHE_HOME", "~/c")),
        ] {
            let path = folder.path().join(at);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("hf_{at}")).unwrap();
            let found = read(&[("HOME", home), variable]).unwrap();
            assert_eq!(sent(&found), Some(format!("Bearer hf_{at}").as_str()));
        }
        let folder_there = read(&[("HF_TOKEN_PATH", home)]).unwrap_err().to_string();
        assert!(folder_there.starts_with("the token's file: "), "{folder_there}");
    }

    #[test]
    fn a_bad_token_is_named_by_where_it_comes_from() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        fs::write(&file, "hf_\u{1}").unwrap();
        for (variable, text, source) in [
            ("HF_TOKEN", "hf_\u{1}", "HF_TOKEN"),
            ("HUGGING_FACE_HUB_TOKEN", "hf_\u{1}", "HUGGING_FACE_HUB_TOKEN"),
            ("HF_TOKEN_PATH", file.to_str().unwrap(), "the token's file"),
        ] {
            let error = read(&[(variable, text)]).unwrap_err().to_string();
            assert_eq!(error, format!("{source}: has characters that cannot be sent"));
        }
    }

    #[test]
    fn the_token_is_in_no_debug_output() {
        let settings = read(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{settings:?}").contains("secret"));
        let error = read(&[("HF_TOKEN", "hf_secret\u{1}")]).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("secret"));
    }

    #[test]
    fn the_endpoint_is_an_http_address() {
        assert_eq!(read(&[]).unwrap().endpoint.as_str(), "https://huggingface.co/");
        assert_eq!(read(&[("HF_ENDPOINT", "http://127.0.0.1:1/x/")]).unwrap().endpoint.path(), "/x");
        for wrong in ["huggingface.co", "file:///x", "http://user:pass@host", "http://host/?a=b"] {
            assert!(read(&[("HF_ENDPOINT", wrong)]).is_err(), "{wrong}");
        }
        assert!(read(&[("HF_HUB_OFFLINE", "true")]).unwrap().offline);
        assert!(!read(&[("HF_HUB_OFFLINE", "0")]).unwrap().offline);
    }
}
