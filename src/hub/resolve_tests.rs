//! Names, good and hostile, against folders made for the test.

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

struct World {
    folder: tempfile::TempDir,
    roots: ModelRoots,
}

fn model(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("model.safetensors"), "weights").unwrap();
}

/// `root/tiny`, `root/owner/small`, a repo `owner/cached` in the cache, and `outside`, which no name may
/// reach.
fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &str| folder.path().join(path);
    model(&at("root/tiny"));
    model(&at("root/owner/small"));
    model(&at("outside"));
    let repo = at("hub/models--owner--cached");
    let snapshot = repo.join("snapshots").join(COMMIT);
    for part in ["refs", "blobs"] {
        fs::create_dir_all(repo.join(part)).unwrap();
    }
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    for (blob, file) in [("1", "config.json"), ("2", "model.safetensors")] {
        fs::write(repo.join("blobs").join(blob), "{}").unwrap();
        symlink(Path::new("../../blobs").join(blob), snapshot.join(file)).unwrap();
    }
    let roots = ModelRoots::new(vec![at("root")], Some(at("hub")), false);
    World { folder, roots }
}

/// Why a name cannot be used.
fn damage(roots: &ModelRoots, name: &str) -> String {
    match roots.resolve(name) {
        Err(error @ (HubError::Damaged { .. } | HubError::Incomplete { .. })) => error.to_string(),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn names_resolve_in_roots_then_in_the_cache() {
    let world = world();
    let tiny = world.roots.resolve("tiny").unwrap();
    assert_eq!(tiny.path, world.folder.path().join("root/tiny").canonicalize().unwrap());
    assert!(tiny.revision.starts_with("local-") && tiny.revision.len() == 18);
    assert_eq!(world.roots.resolve("owner/small").unwrap().name, "owner/small");
    assert_eq!(world.roots.resolve("owner/cached").unwrap().revision, COMMIT);
    model(&world.folder.path().join("root/owner/cached"));
    assert!(world.roots.resolve("owner/cached").unwrap().revision.starts_with("local-"));
}

#[test]
fn list_is_sorted_and_skips_what_is_not_a_model() {
    let world = world();
    let at = |path: &str| world.folder.path().join(path);
    fs::create_dir_all(at("root/empty")).unwrap();
    fs::create_dir_all(at("root/no-weights")).unwrap();
    fs::write(at("root/no-weights/config.json"), "{}").unwrap();
    fs::create_dir_all(at("hub/models--owner--empty/refs")).unwrap();
    let names: Vec<_> = world.roots.list().into_keys().collect();
    assert_eq!(names, ["owner/cached", "owner/small", "tiny"]);
}

#[test]
fn a_model_that_cannot_be_reached_is_listed_with_what_is_wrong() {
    let world = world();
    let at = |path: &str| world.folder.path().join(path);
    symlink(at("outside"), at("root/escape")).unwrap();
    symlink(at("nowhere"), at("root/dangling")).unwrap();
    let listed = world.roots.list();
    let names: Vec<_> = listed.keys().map(String::as_str).collect();
    assert_eq!(names, ["dangling", "escape", "owner/cached", "owner/small", "tiny"]);
    let why = |name: &str| listed[name].as_ref().unwrap_err().to_string();
    assert_eq!(why("dangling"), "dangling: is a link that leads nowhere");
    assert!(why("escape").starts_with("escape: is a link out of the model roots"), "{}", why("escape"));
}

#[test]
fn a_root_that_does_not_exist_is_named_with_every_model_that_is_not_found() {
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &str| folder.path().join(path);
    model(&at("there/tiny"));
    fs::write(at("file"), "").unwrap();
    let roots = ModelRoots::new(vec![at("missing"), at("file"), at("there")], None, false);
    roots.resolve("tiny").unwrap();
    let why = roots.resolve("small").unwrap_err().to_string();
    assert!(why.starts_with("the model root \"missing\" does not exist; the model root \"file\""), "{why}");
    assert_eq!(roots.problems().len(), 2);
}

#[test]
fn a_root_that_is_a_model_has_the_name_of_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("tiny");
    model(&root);
    let roots = ModelRoots::new(vec![root.clone()], None, false);
    assert_eq!(roots.resolve("tiny").unwrap().path, root.canonicalize().unwrap());
    assert_eq!(roots.list().into_keys().collect::<Vec<_>>(), ["tiny"]);
    assert!(matches!(roots.resolve("config.json"), Err(HubError::NotFound { .. })));
}

#[test]
fn hostile_names_are_refused() {
    let world = world();
    let outside = world.folder.path().join("outside");
    let long = "a".repeat(513);
    let absolute = outside.to_str().unwrap();
    for name in [
        "",
        ".",
        "..",
        "/",
        "../outside",
        "tiny/..",
        "tiny/../tiny",
        "a/../../outside",
        "tiny/",
        "/tiny",
        "a//b",
        "a/b/c",
        "tiny\0",
        "tiny\n",
        "\u{202e}tiny",
        "ti\u{200b}ny",
        "tiny\u{2028}",
        "..\\outside",
        ".hidden",
        "owner/.hidden",
        absolute,
        &long,
    ] {
        let error = world.roots.resolve(name).unwrap_err();
        assert!(matches!(error, HubError::InvalidName { .. }), "{name:?}: {error}");
    }
    for name in
        ["owner", "nobody", "owner/nobody", "owner--cached", "TINY/x", "config.json", "tiny/config.json"]
    {
        let error = world.roots.resolve(name).unwrap_err();
        assert!(matches!(error, HubError::NotFound { .. }), "{name:?}: {error}");
    }
}

#[test]
fn links_may_leave_the_roots_only_if_the_owner_says_so() {
    let world = world();
    let at = |path: &str| world.folder.path().join(path);
    symlink(at("outside"), at("root/folder-link")).unwrap();
    symlink(at("root"), at("root/itself")).unwrap();
    model(&at("root/file-link"));
    fs::remove_file(at("root/file-link/config.json")).unwrap();
    symlink(at("outside/config.json"), at("root/file-link/config.json")).unwrap();
    let anywhere = ModelRoots { links_anywhere: true, ..world.roots.clone() };
    for (name, link) in [
        ("folder-link", "folder-link"),
        ("file-link", "file-link/config.json"),
        ("itself/folder-link", "itself/folder-link"),
    ] {
        let why = damage(&world.roots, name);
        assert!(why.starts_with(&format!("{link}: is a link out of the model roots")), "{why}");
        anywhere.resolve(name).unwrap();
    }
    assert!(matches!(world.roots.resolve("itself"), Err(HubError::NotFound { .. })));
    symlink(at("root/tiny"), at("root/alias")).unwrap();
    symlink(at("hub/models--owner--cached/snapshots").join(COMMIT), at("root/cached-alias")).unwrap();
    assert_eq!(world.roots.resolve("alias").unwrap().path, world.roots.resolve("tiny").unwrap().path);
    world.roots.resolve("cached-alias").unwrap();
}

#[test]
fn a_commit_that_is_a_path_is_not_followed() {
    let world = world();
    let main = world.folder.path().join("hub/models--owner--cached/refs/main");
    for commit in ["../../../outside", "..", "", "/"] {
        fs::write(&main, commit).unwrap();
        assert!(damage(&world.roots, "owner/cached").contains("refs/main names no commit"), "{commit:?}");
    }
}

#[test]
fn the_only_complete_snapshot_is_used_without_refs_main() {
    let world = world();
    let repo = world.folder.path().join("hub/models--owner--cached");
    let snapshot = |commit: &str| repo.join("snapshots").join(commit);
    fs::remove_dir_all(repo.join("refs")).unwrap();
    assert_eq!(world.roots.resolve("owner/cached").unwrap().revision, COMMIT);
    // One that was not downloaded to its end does not count.
    fs::create_dir_all(snapshot("half")).unwrap();
    fs::write(snapshot("half").join("config.json"), "{}").unwrap();
    assert_eq!(world.roots.resolve("owner/cached").unwrap().revision, COMMIT);
    fs::write(snapshot("half").join("model.safetensors"), "{}").unwrap();
    assert!(damage(&world.roots, "owner/cached").contains("has several snapshots"));
}

#[test]
fn snapshots_that_are_not_whole_are_named_as_such() {
    let world = world();
    let repo = world.folder.path().join("hub/models--owner--cached");
    let weights = repo.join("snapshots").join(COMMIT).join("model.safetensors");
    fs::remove_file(repo.join("blobs/2")).unwrap();
    let why = damage(&world.roots, "owner/cached");
    assert!(why.contains("is incomplete: model.safetensors is a link that leads nowhere"), "{why}");
    assert!(world.roots.list()["owner/cached"].is_err());
    fs::remove_file(weights).unwrap();
    assert!(damage(&world.roots, "owner/cached").contains("is incomplete: it has no weight file"));
    fs::write(repo.join("refs/main"), "0123").unwrap();
    assert!(damage(&world.roots, "owner/cached").contains("its snapshot 0123 is not in the"));
    fs::remove_dir_all(repo.join("refs")).unwrap();
    fs::remove_dir_all(repo.join("snapshots")).unwrap();
    assert!(damage(&world.roots, "owner/cached").contains("has no snapshot"));
}

#[test]
fn a_revision_of_the_cache_is_named_with_an_at_sign() {
    let world = world();
    let repo = world.folder.path().join("hub/models--owner--cached");
    let old = "fedcba9876543210fedcba9876543210fedcba98";
    model(&repo.join("snapshots").join(old));
    fs::write(repo.join("refs/v1.0"), old).unwrap();
    let revision = |name: &str| world.roots.resolve(name).map(|found| found.revision).ok();
    assert_eq!(revision("owner/cached").as_deref(), Some(COMMIT));
    assert_eq!(revision("owner/cached@main").as_deref(), Some(COMMIT));
    assert_eq!(revision("owner/cached@v1.0").as_deref(), Some(old));
    assert_eq!(revision(&format!("owner/cached@{old}")).as_deref(), Some(old));
    fs::create_dir_all(repo.join("refs/refs/pr")).unwrap();
    fs::write(repo.join("refs/refs/pr/1"), old).unwrap();
    assert_eq!(revision("owner/cached@refs/pr/1").as_deref(), Some(old));
    let long = format!("owner/cached@{}", "a/".repeat(126));
    assert!(matches!(world.roots.resolve(&format!("{long}a")), Err(HubError::NotFound { .. })));
    let odd =
        ["v2", "", "..", ".x", "a@b", "refs/pr", "refs/../main", "/main", "main/", "refs//pr/1", "x/.y"];
    for name in odd {
        assert_eq!(revision(&format!("owner/cached@{name}")), None, "{name}");
    }
}

#[test]
fn a_revision_with_slashes_leads_into_no_root() {
    let world = world();
    model(&world.folder.path().join("root/owner/small@a/b"));
    assert!(world.roots.resolve("owner/small@a/b").is_err());
}

#[test]
fn a_download_that_was_interrupted_is_named_as_such() {
    let world = world();
    let blobs = world.folder.path().join("hub/models--owner--begun/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("0.mlxd.incomplete"), "").unwrap();
    assert!(damage(&world.roots, "owner/begun").contains("not downloaded completely: `mlxd pull`"));
}

#[test]
fn the_local_revision_follows_the_files() {
    let world = world();
    let revision = || world.roots.resolve("tiny").unwrap().revision;
    let before = revision();
    assert_eq!(before, revision());
    fs::write(world.folder.path().join("root/tiny/model.safetensors"), "other weights").unwrap();
    let after = revision();
    assert_ne!(before, after);
    fs::write(world.folder.path().join("root/tiny/tokenizer.json"), "{}").unwrap();
    assert_ne!(after, revision());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_name_leads_outside(
        name in "[a./\\\\-]{0,8}(outside|tiny|owner|small|cached)?[a./-]{0,4}(@[a./-]{0,6})?",
    ) {
        let world = world();
        if let Ok(found) = world.roots.resolve(&name) {
            let base = world.folder.path().canonicalize().unwrap();
            prop_assert!(found.path.starts_with(base.join("root")) || found.path.starts_with(base.join("hub")));
        }
    }
}
