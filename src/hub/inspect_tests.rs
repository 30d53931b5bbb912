//! Weight files, whole and broken.

use proptest::prelude::*;

use super::*;
use crate::error::Error;

fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0; data_bytes]);
    bytes
}

fn inspect_files(files: &[(&str, Vec<u8>)]) -> Result<WeightIndex, HubError> {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    inspect(folder.path())
}

fn error(header: &str, data_bytes: usize) -> String {
    inspect_files(&[("model.safetensors", file(header, data_bytes))]).unwrap_err().to_string()
}

const TWO: &str = r#"{"__metadata__":{"format":"mlx"},
    "b":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},
    "a":{"dtype":"BF16","shape":[],"data_offsets":[16,18]}}"#;

#[test]
fn a_whole_file_lists_its_tensors_in_order_of_data() {
    let weights =
        inspect_files(&[("model.safetensors", file(TWO, 18)), ("other.safetensors", vec![1])]).unwrap();
    assert_eq!((weights.tensors_count, weights.bytes), (2, 18));
    let names: Vec<_> = weights.tensors().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["b", "a"]);
    assert_eq!(weights.files[0].tensors[0].shape, [2, 2]);
    assert_eq!(weights.files[0].tensors[0].dtype, Dtype::F32);
}

#[test]
fn lies_are_found_and_name_file_and_tensor() {
    let one = |entry: &str| format!("{{\"t\":{entry}}}");
    let cases = [
        (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#), 4, "tensor t: F32 [2] does not fit bytes"),
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#), 4, "tensor t: F32 [1] does not fit bytes"),
        (one(r#"{"dtype":"X9","shape":[1],"data_offsets":[0,4]}"#), 4, "tensor t: unknown variant `X9`"),
        (one(r#"{"dtype":"F64","shape":[1],"data_offsets":[0,8]}"#), 8, "tensor t: MLX has no dtype F64"),
        (one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#), 4, "tensor t: invalid value"),
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#), 8, "tensor t: leaves a gap"),
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), 3, "cut short within tensor t"),
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), 5, "1 bytes that no tensor owns"),
        (one(r#"{"dtype":"U8","shape":[0,3000000000],"data_offsets":[0,0]}"#), 0, "has a dimension over"),
        (
            one(r#"{"dtype":"U8","shape":[2147483647,2147483647,2147483647],"data_offsets":[0,1]}"#),
            1,
            "does not fit bytes",
        ),
        (one("7"), 0, "tensor t: invalid type"),
        ("[]".into(), 0, "header that is not valid"),
        ("{} {}".into(), 0, "header that is not valid"),
        ("{".into(), 0, "header that is not valid"),
        (
            r#"{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"u":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#
                .into(),
            6,
            "tensor u: overlaps another",
        ),
        (
            r#"{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"t":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}"#
                .into(),
            6,
            "tensor t is in the header twice",
        ),
    ];
    for (header, data_bytes, expected) in cases {
        let message = error(&header, data_bytes);
        assert!(message.contains("model.safetensors: "), "{message}");
        assert!(message.contains(expected), "{message} does not say {expected:?}");
    }
}

#[test]
fn a_header_length_is_not_believed() {
    let long = |n: u64| n.to_le_bytes().to_vec();
    let message = |bytes| inspect_files(&[("model.safetensors", bytes)]).unwrap_err().to_string();
    assert!(message(long(u64::MAX)).contains("at most"));
    assert!(message(long(1 << 20)).contains("ends within its header"));
    assert!(message(vec![1, 2, 3]).contains("too short"));
    assert!(message(file("\u{0}{}", 0)).contains("not valid"));
}

fn shard(name: &str) -> Vec<u8> {
    file(&format!("{{\"{name}\":{{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}}}"), 1)
}

fn index(map: &str) -> (&'static str, Vec<u8>) {
    (INDEX, format!("{{\"weight_map\":{map}}}").into_bytes())
}

/// An index of two shards, with a tensor each.
fn two() -> (&'static str, Vec<u8>) {
    index(r#"{"a":"model-1.safetensors","b":"model-2.safetensors"}"#)
}

fn names(weights: &WeightIndex) -> Vec<&str> {
    weights.tensors().map(|tensor| tensor.name.as_str()).collect()
}

#[test]
fn shards_must_not_repeat_a_tensor() {
    let both = inspect_files(&[("model-1.safetensors", shard("a")), ("model-2.safetensors", shard("a"))]);
    assert!(both.unwrap_err().to_string().contains("tensor a is in model-1.safetensors too"));
}

#[test]
fn an_index_whose_shards_are_all_there_is_taken_at_its_word() {
    let shards = [("model-1.safetensors", shard("a")), ("model-2.safetensors", shard("b"))];
    let weights = inspect_files(&[shards[0].clone(), shards[1].clone(), two()]).unwrap();
    assert_eq!((names(&weights), &weights.warning), (vec!["a", "b"], &None));
    let other = [("model-1.safetensors", shard("a")), ("model-2.safetensors", shard("c")), two()];
    let why = inspect_files(&other).unwrap_err().to_string();
    assert!(why.contains("promises tensor b in model-2.safetensors"), "{why}");
    for broken in ["{}", "{\"weight_map\":{\"a\":3}}", "[", "\u{fffd}"] {
        let broken = [("model-1.safetensors", shard("a")), (INDEX, broken.as_bytes().to_vec())];
        assert!(inspect_files(&broken).is_err());
    }
}

#[test]
fn one_missing_shard_of_an_index_is_named() {
    let why = inspect_files(&[("model-1.safetensors", shard("a")), two()]).unwrap_err().to_string();
    assert_eq!(why, format!("{INDEX}: names model-2.safetensors among 2 files; it is not there"));
    let why = inspect_files(&[two()]).unwrap_err().to_string();
    assert_eq!(why, format!("{INDEX}: names model-1.safetensors among 2 files; it is not there"));
}

#[test]
fn an_index_whose_shards_are_all_absent_does_not_stop_a_whole_file() {
    let weights = inspect_files(&[("model.safetensors", shard("a")), two()]).unwrap();
    assert_eq!(names(&weights), ["a"]);
    let warning = weights.warning.unwrap();
    assert!(warning.contains("is not used") && warning.contains("model-1.safetensors"), "{warning}");
}

#[test]
fn a_file_that_the_index_does_not_name_is_spare() {
    let stray = |tensor: &str| {
        let shards = [("model-1.safetensors", shard("a")), ("model-2.safetensors", shard("b"))];
        inspect_files(&[shards[0].clone(), shards[1].clone(), ("model.safetensors", shard(tensor)), two()])
            .unwrap()
    };
    for tensor in ["a", "c"] {
        let weights = stray(tensor);
        assert_eq!((names(&weights), weights.tensors_count, weights.bytes), (vec!["a", "b"], 2, 2));
        assert_eq!(weights.spare[0].tensors[0].name, tensor);
        assert_eq!(
            weights.warning.unwrap(),
            format!("model.safetensors is not used: {INDEX} does not name it")
        );
    }
    // It has what is missing elsewhere.
    let lacks = [("model-1.safetensors", shard("a")), ("model-2.safetensors", shard("c"))];
    inspect_files(&[lacks[0].clone(), lacks[1].clone(), ("model.safetensors", shard("b")), two()]).unwrap();
    // Damage to it does not damage the model.
    let whole = [("model-1.safetensors", shard("a")), ("model-2.safetensors", shard("b"))];
    inspect_files(&[whole[0].clone(), whole[1].clone(), ("model.safetensors", vec![1]), two()]).unwrap();
}

#[test]
fn an_index_names_its_files_as_it_likes_but_in_the_folder() {
    let own = index(r#"{"a":"weights.00.safetensors"}"#);
    assert_eq!(names(&inspect_files(&[("weights.00.safetensors", shard("a")), own]).unwrap()), ["a"]);
    for outside in ["../model.safetensors", "/etc/passwd", "..", ""] {
        let index = index(&format!("{{\"a\":\"{outside}\"}}"));
        assert!(inspect_files(&[index]).unwrap_err().to_string().contains("it is not there"), "{outside}");
    }
}

#[test]
fn no_weight_file_is_damage() {
    assert!(inspect_files(&[]).unwrap_err().to_string().contains("model.safetensors: is missing"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_header_is_read_or_refused(header in ".{0,80}", data in 0usize..64) {
        let _ = inspect_files(&[("model.safetensors", file(&header, data))]);
    }

    #[test]
    fn what_is_accepted_adds_up(
        entries in prop::collection::vec((0usize..4, 0usize..40, 0usize..40, 0usize..3), 0..4), data in 0usize..64,
    ) {
        let header: Vec<String> = entries
            .iter()
            .map(|(n, start, end, dtype)| {
                let dtype = ["U8", "F16", "F32"][*dtype];
                format!("\"t{n}\":{{\"dtype\":\"{dtype}\",\"shape\":[{n}],\"data_offsets\":[{start},{end}]}}")
            })
            .collect();
        let header = format!("{{{}}}", header.join(","));
        if let Ok(weights) = inspect_files(&[("model.safetensors", file(&header, data))]) {
            prop_assert_eq!(weights.bytes, data as u64);
        }
    }
}

#[test]
fn a_file_that_changes_after_its_header_was_read_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, file(TWO, 18)).unwrap();
    let weights = inspect(folder.path()).unwrap();
    weights.check_unchanged().unwrap();
    fs::write(&path, file(TWO, 19)).unwrap();
    let changed = weights.check_unchanged().unwrap_err();
    assert_eq!(changed.to_string(), "model.safetensors: changed after its header was read");
    // The next call reads the files as they are now.
    assert_eq!(changed.into_error(&"m".into()), Error::ModelUnloaded("m".into()));
    fs::remove_file(&path).unwrap();
    assert!(matches!(weights.check_unchanged(), Err(HubError::Changed { .. })));
}
