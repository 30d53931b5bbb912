//! `mlxd ps`: shows resident models, sessions, and memory use.

use std::time::{Duration, SystemTime};

use clap::Args;
use mlxd::clock::{Clock as _, SystemClock};
use mlxd_client::Client;
use mlxd_client::v1::{GetStatsRequest, GetStatsResponse, ListModelsRequest, ModelInfo, ModelState, Session};

use super::connect::{ConnectArgs, NO_MODELS};
use super::failure::Result;
use super::{format, json, out};

const EXAMPLES: &str = "\
Examples:
  mlxd ps
  mlxd ps --all
  mlxd ps --json | jq .stats.memory";

/// Show resident models, your sessions, and memory use.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct PsArgs {
    /// Also show the models on disk
    #[arg(long, short)]
    all: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Runs the command.
pub(crate) async fn run(args: PsArgs) -> Result<()> {
    let client = args.connect.connect().await?;
    let (models, problems, sessions, stats) = tokio::try_join!(
        client.list_all_models(!args.all),
        root_problems(&client, args.all),
        client.list_all_sessions(),
        client.get_stats(GetStatsRequest {}),
    )?;
    if args.json {
        json::print(&serde_json::json!({
            "models": models.iter().map(json::model).collect::<Vec<_>>(),
            "problems": problems,
            "sessions": sessions.iter().map(json::session).collect::<Vec<_>>(),
            "stats": json::stats(&stats),
        }))?;
        return Ok(());
    }
    let page = page((&models, &problems), args.all, (&sessions, &stats), SystemClock::new().wall());
    out::data(&page)?;
    Ok(())
}

/// Returns what is wrong with the model roots, where models on disk are shown too.
async fn root_problems(client: &Client, all: bool) -> mlxd_client::Result<Vec<String>> {
    if !all {
        return Ok(Vec::new());
    }
    // Every page has them; this one reads nothing from the disk.
    let request = ListModelsRequest { page_size: 1, resident_only: true, ..Default::default() };
    Ok(client.list_models(request).await?.problems)
}

fn page(
    (models, problems): (&[ModelInfo], &[String]),
    all: bool,
    (sessions, stats): (&[Session], &GetStatsResponse),
    now: SystemTime,
) -> String {
    let mut page = if models.is_empty() && all {
        format!("{NO_MODELS}\n")
    } else if models.is_empty() {
        "no model is resident; `mlxd load MODEL` loads one, `mlxd ps --all` lists those on disk\n".to_owned()
    } else {
        let header =
            ["MODEL", "STATE", "PARAMETERS", "STORED AS", "COMPUTES IN", "WEIGHTS", "KV", "RUNNING", "UNTIL"];
        format::page(&header, models.iter().map(|model| model_row(model, now)))
    };
    let of_models = models.iter().map(|model| &model.problem).filter(|problem| !problem.is_empty());
    for problem in problems.iter().chain(of_models) {
        page.push_str(&format!("! {problem}\n"));
    }
    if !sessions.is_empty() {
        page.push('\n');
        let header = ["SESSION", "MODEL", "TURNS", "TOKENS", "STATE"];
        page.push_str(&format::page(&header, sessions.iter().map(session_row)));
    }
    page.push('\n');
    page.push_str(&summary(stats));
    page
}

fn model_row(info: &ModelInfo, now: SystemTime) -> Vec<String> {
    // A model on disk uses no memory; a zero would look like a measurement.
    let bytes = |count| if count == 0 { "-".to_owned() } else { format::bytes(count) };
    let text = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let waiting =
        if info.queued_sequences == 0 { String::new() } else { format!(" +{}", info.queued_sequences) };
    vec![
        info.name.clone(),
        if info.problem.is_empty() {
            json::enum_name(info.state().as_str_name(), "MODEL_STATE_")
        } else {
            "unusable".to_owned()
        },
        if info.parameter_count == 0 { "-".to_owned() } else { format::count(info.parameter_count) },
        text(&info.stored_as),
        text(&info.computes_in),
        bytes(info.weight_bytes),
        bytes(info.kv_slab_bytes + info.kv_idle_bytes),
        format!("{}{waiting}", info.running_sequences),
        if info.state() == ModelState::Resident {
            format::until(info.pinned, info.expire_time, "forever", now)
        } else {
            "-".to_owned()
        },
    ]
}

fn session_row(session: &Session) -> Vec<String> {
    vec![
        session.name.clone(),
        session.model.clone(),
        session.turns.len().to_string(),
        session.token_count.to_string(),
        if session.busy { "busy" } else { "idle" }.to_owned(),
    ]
}

fn summary(stats: &GetStatsResponse) -> String {
    let memory = stats.memory.unwrap_or_default();
    // Parked caches lie outside the slabs.
    let kv_bytes = memory.kv_slab_bytes + memory.kv_idle_bytes;
    let process = if memory.process_resident_bytes == 0 {
        String::new()
    } else {
        format!("; process {}", format::bytes(memory.process_resident_bytes))
    };
    let on_disk =
        stats.snapshots.filter(|snapshots| snapshots.enabled).map_or_else(String::new, |snapshots| {
            let fails = if snapshots.writable { "" } else { ", which cannot be written now" };
            format!(
                "KV on disk: {} of {} sessions{fails}\n",
                format::bytes(snapshots.bytes),
                snapshots.snapshots
            )
        });
    let uptime = Duration::from_secs_f64(format::seconds(stats.uptime.as_ref()).max(0.0));
    format!(
        "memory: {} of {} (weights {}, KV {}, of it {} parked){process}\n{on_disk}up {}: {} requests, {} tokens \
         generated, {} prefilled, {} found in the cache; {} running, {} waiting\n",
        format::bytes(memory.weight_bytes + kv_bytes),
        format::bytes(memory.budget_bytes),
        format::bytes(memory.weight_bytes),
        format::bytes(kv_bytes),
        format::bytes(memory.kv_idle_bytes),
        format::duration(uptime),
        stats.requests_total,
        stats.decode_tokens_total,
        stats.prefill_tokens_total,
        stats.cached_tokens_total,
        stats.running_sequences,
        stats.queued_sequences,
    )
}
