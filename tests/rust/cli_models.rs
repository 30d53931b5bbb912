//! What the commands say of the models on disk.

use crate::cli::fake::FakeDaemon;
use crate::cli::{json, run, stdout};

#[tokio::test(flavor = "multi_thread")]
async fn ps_with_all_names_what_is_wrong_with_the_model_roots() {
    let fake = FakeDaemon::start();
    let problem = "the model root \"unplugged\" does not exist";
    fake.state().problems = vec![problem.into()];
    let shown = stdout(&run(&fake, &["ps", "--all"]));
    assert!(shown.contains(&format!("\n! {problem}\n")), "{shown}");
    let value = json(&run(&fake, &["ps", "--all", "--json"]));
    assert_eq!(value["problems"], serde_json::json!([problem]));
    assert!(!stdout(&run(&fake, &["ps"])).contains("unplugged"));
}
