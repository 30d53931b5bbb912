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
    let roots = ModelRoots::new(vec![at("missing"), at("root")], Some(at("hub")));
    World { folder, roots }
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
fn list_is_sorted_and_skips_what_cannot_be_loaded() {
    let world = world();
    let at = |path: &str| world.folder.path().join(path);
    fs::create_dir_all(at("root/empty")).unwrap();
    fs::create_dir_all(at("root/no-weights")).unwrap();
    fs::write(at("root/no-weights/config.json"), "{}").unwrap();
    fs::create_dir_all(at("hub/models--owner--empty/refs")).unwrap();
    symlink(at("outside"), at("root/escape")).unwrap();
    let names: Vec<_> = world.roots.list().into_iter().map(|folder| folder.name).collect();
    assert_eq!(names, ["owner/cached", "owner/small", "tiny"]);
}

#[test]
fn hostile_names_are_refused() {
    let world = world();
    let outside = world.folder.path().join("outside");
    let long = "a".repeat(257);
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
fn links_may_not_leave_the_roots() {
    let world = world();
    let at = |path: &str| world.folder.path().join(path);
    symlink(at("outside"), at("root/folder-link")).unwrap();
    symlink(at("root"), at("root/itself")).unwrap();
    model(&at("root/file-link"));
    fs::remove_file(at("root/file-link/config.json")).unwrap();
    symlink(at("outside/config.json"), at("root/file-link/config.json")).unwrap();
    for name in ["folder-link", "itself", "file-link", "itself/folder-link"] {
        assert!(matches!(world.roots.resolve(name), Err(HubError::NotFound { .. })), "{name}");
    }
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
        assert!(matches!(world.roots.resolve("owner/cached"), Err(HubError::NotFound { .. })), "{commit:?}");
    }
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
    fn no_name_leads_outside(name in "[a./\\\\-]{0,8}(outside|tiny|owner|small|cached)?[a./-]{0,4}") {
        let world = world();
        if let Ok(found) = world.roots.resolve(&name) {
            let base = world.folder.path().canonicalize().unwrap();
            prop_assert!(found.path.starts_with(base.join("root")) || found.path.starts_with(base.join("hub")));
        }
    }
}
