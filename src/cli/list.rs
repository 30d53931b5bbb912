//! `mlxd list`: the models on this machine. Works without a daemon; says which are resident if one answers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use clap::Args;
use mlxd::clock::{Clock as _, SystemClock};
use mlxd::hub::{ModelCatalog, ModelFolder, ModelRoots};
use mlxd_client::v1::ModelInfo;

use super::connect::ConnectArgs;
use super::failure::Result;
use super::{config, format, json, out};

const EXAMPLES: &str = "\
Examples:
  mlxd list
  mlxd list --json | jq -r '.models[].name'

Models are those under `model_roots` of the configuration and in the Hugging Face cache.";

/// List the models on this machine.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ListArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// A model's folder, or what is wrong with it.
type Found = std::result::Result<ModelFolder, String>;

/// A model on this machine.
struct Row {
    name: String,
    revision: String,
    bytes: u64,
    stored_as: String,
    modified: Option<SystemTime>,
    /// When the daemon used it last, if it is resident.
    resident: Option<Option<SystemTime>>,
    problem: String,
}

/// Runs the command.
pub(crate) async fn run(args: ListArgs) -> Result<()> {
    let roots = config()?.roots();
    let resident = resident(&args.connect).await?;
    let rows = tokio::task::spawn_blocking(move || rows(roots, &resident));
    let rows = rows.await.map_err(anyhow::Error::from)?;
    if args.json {
        json::print(&serde_json::json!({ "models": rows.iter().map(Row::json).collect::<Vec<_>>() }))?;
    } else {
        out::data(&page(&rows, SystemClock::new().wall()))?;
    }
    Ok(())
}

/// Returns the resident models; none if no daemon answers.
async fn resident(connect: &ConnectArgs) -> Result<BTreeMap<String, ModelInfo>> {
    let Some(client) = connect.connect_if_there().await? else { return Ok(BTreeMap::new()) };
    let models = client.list_all_models(true).await?;
    Ok(models.into_iter().map(|model| (model.name.clone(), model)).collect())
}

fn rows(roots: ModelRoots, resident: &BTreeMap<String, ModelInfo>) -> Vec<Row> {
    let catalog = ModelCatalog::new(roots);
    let row = |(name, found): (String, Found)| {
        let resident =
            resident.get(&name).map(|model| model.last_use_time.and_then(|time| time.try_into().ok()));
        let mut row = Row {
            name,
            revision: String::new(),
            bytes: 0,
            stored_as: String::new(),
            modified: None,
            resident,
            problem: String::new(),
        };
        let folder = match found {
            Ok(folder) => folder,
            Err(problem) => return Row { problem, ..row },
        };
        (row.bytes, row.modified) = size_and_time(&folder.path);
        match catalog.facts_of(&folder) {
            Ok(facts) => row.stored_as = facts.stored_as,
            Err(error) => row.problem = error.to_string(),
        }
        Row { revision: folder.revision, ..row }
    };
    let listed = catalog.list().into_iter();
    let mut listed: BTreeMap<String, Found> =
        listed.map(|(name, found)| (name, found.map_err(|error| error.to_string()))).collect();
    // Those of a revision of its own are not on the list.
    for name in resident.keys() {
        let find = || catalog.resolve(&name.as_str().into()).map_err(|error| error.to_string());
        listed.entry(name.clone()).or_insert_with(find);
    }
    listed.into_iter().map(row).collect()
}

/// Returns the bytes of a folder's files and the time of the last change of one, links followed.
fn size_and_time(folder: &Path) -> (u64, Option<SystemTime>) {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let files = files.filter_map(|entry| fs::metadata(entry.path()).ok()).filter(fs::Metadata::is_file);
    let none: (u64, Option<SystemTime>) = (0, None);
    files.fold(none, |(bytes, time), file| (bytes + file.len(), time.max(file.modified().ok())))
}

impl Row {
    fn json(&self) -> serde_json::Value {
        let seconds = |time: Option<SystemTime>| {
            time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|time| time.as_secs())
        };
        serde_json::json!({
            "name": self.name,
            "revision": self.revision,
            "file_bytes": self.bytes,
            "stored_as": self.stored_as,
            "modified": seconds(self.modified),
            "resident": self.resident.is_some(),
            "last_use": seconds(self.resident.flatten()),
            "problem": self.problem,
        })
    }

    fn cells(&self, now: SystemTime) -> Vec<String> {
        let ago = |time: SystemTime| {
            let age = now.duration_since(time).unwrap_or(Duration::ZERO);
            format!("{} ago", format::duration(age))
        };
        let state = match self.resident {
            None => String::new(),
            Some(None) => "resident".to_owned(),
            Some(Some(used)) => format!("resident, used {}", ago(used)),
        };
        let text = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let modified = self.modified.map_or_else(|| "-".to_owned(), ago);
        vec![self.name.clone(), format::bytes(self.bytes), text(&self.stored_as), modified, state]
    }
}

fn page(rows: &[Row], now: SystemTime) -> String {
    if rows.is_empty() {
        return "no models: `mlxd pull REPO` downloads one, `mlxd convert` makes one\n".to_owned();
    }
    let header = ["MODEL", "SIZE", "STORED AS", "MODIFIED", "STATE"].map(str::to_owned).to_vec();
    let cells = rows.iter().map(|row| row.cells(now));
    let mut page = format::table(&std::iter::once(header).chain(cells).collect::<Vec<_>>());
    for row in rows.iter().filter(|row| !row.problem.is_empty()) {
        page.push_str(&format!("! {}: {}\n", row.name, row.problem));
    }
    page
}
