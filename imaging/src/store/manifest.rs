//! What the local store keeps beside its files: a manifest for each image and each disk. A manifest is replaced by
//! renaming a new one over it, and every change of the store is one such rename: before it nothing has happened, after
//! it all has. Layers that no manifest names are what a crash left, and are swept up.
//!
//! ```text
//! golden image ◀─ layer ◀─ layer ◀─ top
//! └──────── an image by snapshot ──┘  │      every layer but a disk's top is frozen
//! └──────────── a disk ───────────────┘
//! ```

use super::StoreError;
use super::file::sync_folder;
use super::merkle::Hash;
use super::qcow2::MAX_VIRTUAL_BYTES;
use assay_wire::id::{DiskId, ImageKey, ProjectId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Layers between a golden image and a disk's top: every read may pass through all of them.
pub const MAX_LAYERS: usize = 64;
const LAYOUT: u32 = 2;
/// More than any manifest.
const MAX_MANIFEST_BYTES: u64 = 64 << 10;

/// A layer: what one disk wrote, frozen, or still being written as a disk's top.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerId(uuid::Uuid);

impl LayerId {
    pub(super) fn random() -> Self {
        Self(uuid::Uuid::new_v4())
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for LayerId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// A golden image and the frozen layers on it, lowest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chain {
    /// The golden image.
    pub golden: ImageKey,
    /// The layers on it.
    pub layers: Vec<LayerId>,
}

/// `images/<key>/image.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageManifest {
    layout: u32,
    /// The image: also its folder's name.
    pub key: ImageKey,
    /// Size of the disk that a node sees.
    pub virtual_bytes: u64,
    /// Octets that it takes.
    pub data_bytes: u64,
    /// Where its content is.
    pub content: ImageContent,
}

/// Where an image's content is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ImageContent {
    /// In a file of its own.
    Golden {
        /// SHA-256 of all of it, hexadecimal.
        sha256: String,
        /// The root of its hash tree.
        #[serde(with = "hex_hash")]
        root: Hash,
    },
    /// In layers.
    Snapshot {
        /// The image that its disk was made from.
        parent: ImageKey,
        /// The layers.
        chain: Chain,
    },
}

/// `disks/<disk id>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskManifest {
    layout: u32,
    /// The disk: also its file's name.
    pub disk: DiskId,
    /// Whose it is.
    pub project: ProjectId,
    /// The image that it was last made from.
    pub image: ImageKey,
    /// What its top reads where it was not written.
    pub chain: Chain,
    /// Where its writes go.
    pub top: LayerId,
}

impl ImageManifest {
    pub(super) fn new(key: ImageKey, virtual_bytes: u64, data_bytes: u64, content: ImageContent) -> Self {
        Self { layout: LAYOUT, key, virtual_bytes, data_bytes, content }
    }

    /// The golden image and layers that a disk of this image stands on.
    #[must_use]
    pub fn chain(&self) -> Chain {
        match &self.content {
            ImageContent::Golden { .. } => Chain { golden: self.key, layers: Vec::new() },
            ImageContent::Snapshot { chain, .. } => chain.clone(),
        }
    }

    /// Parses a manifest.
    ///
    /// # Errors
    /// Says what is wrong with it, continuing a sentence that its file's name begins.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|cause| format!("is no image's manifest: {cause}"))?;
        check(manifest.layout, &manifest.chain())?;
        if manifest.virtual_bytes == 0
            || manifest.virtual_bytes > MAX_VIRTUAL_BYTES
            || !manifest.virtual_bytes.is_multiple_of(512)
        {
            return Err(format!("says {} octets, which no disk has", manifest.virtual_bytes));
        }
        Ok(manifest)
    }
}

impl DiskManifest {
    pub(super) fn new(disk: DiskId, project: ProjectId, image: ImageKey, chain: Chain, top: LayerId) -> Self {
        Self { layout: LAYOUT, disk, project, image, chain, top }
    }

    /// Parses a manifest.
    ///
    /// # Errors
    /// Says what is wrong with it, continuing a sentence that its file's name begins.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self =
            serde_json::from_slice(bytes).map_err(|cause| format!("is no disk's manifest: {cause}"))?;
        check(manifest.layout, &manifest.chain)?;
        if manifest.chain.layers.contains(&manifest.top) {
            return Err(format!("has layer {} as its top and frozen below it", manifest.top));
        }
        Ok(manifest)
    }
}

fn check(layout: u32, chain: &Chain) -> Result<(), String> {
    if layout != LAYOUT {
        return Err(format!("is of layout {layout}, not {LAYOUT}"));
    }
    if chain.layers.len() > MAX_LAYERS {
        return Err(format!("has {} layers, more than {MAX_LAYERS}", chain.layers.len()));
    }
    Ok(())
}

/// Reads the manifest at `path` with its `parse`.
pub(super) fn read<T>(path: &Path, parse: fn(&[u8]) -> Result<T, String>) -> Result<T, StoreError> {
    let failed = |source| StoreError::io("reading", path, source);
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_MANIFEST_BYTES).read_to_end(&mut bytes)).map_err(failed)?;
    parse(&bytes).map_err(|detail| StoreError::malformed(path, detail))
}

/// Puts `value` at `path`, durably, in place of what is there: all of it or nothing.
pub(super) fn replace(path: &Path, value: &(impl Serialize + DeserializeOwned)) -> Result<(), StoreError> {
    let failed = |source| StoreError::io("writing", path, source);
    let json = serde_json::to_vec_pretty(value).map_err(|cause| failed(cause.into()))?;
    let staged = path.with_extension("json-new");
    let written = write_synced(&staged, &json)
        .and_then(|()| std::fs::rename(&staged, path))
        .and_then(|()| path.parent().map_or(Ok(()), sync_folder));
    written.map_err(failed)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(super) mod hex_hash {
    //! A hash as hexadecimal text.
    use super::Hash;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(in super::super) fn serialize<S: Serializer>(hash: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(hash))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut hash = [0; 32];
        hex::decode_to_slice(&text, &mut hash).map_err(D::Error::custom)?;
        Ok(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn disk(layers: usize) -> DiskManifest {
        let chain = Chain { golden: ImageKey::random(), layers: (0..layers).map(|_| LayerId::random()).collect() };
        DiskManifest::new(DiskId::random(), "p1".parse().unwrap(), ImageKey::random(), chain, LayerId::random())
    }

    #[test]
    fn a_top_is_not_frozen_below_itself() {
        let mut manifest = disk(2);
        let json = |manifest: &DiskManifest| serde_json::to_vec(manifest).unwrap();
        assert_eq!(DiskManifest::parse(&json(&manifest)).unwrap(), manifest);
        manifest.top = manifest.chain.layers[0];
        assert!(DiskManifest::parse(&json(&manifest)).unwrap_err().contains("frozen below it"));
        let error = DiskManifest::parse(&json(&disk(MAX_LAYERS + 1))).unwrap_err();
        assert!(error.contains("65 layers"), "{error}");
    }

    #[test]
    fn images_have_a_size_and_a_layout() {
        let content = ImageContent::Golden { sha256: "00".into(), root: [7; 32] };
        let good = ImageManifest::new(ImageKey::random(), 512, 0, content);
        let json = serde_json::to_string(&good).unwrap();
        assert_eq!(ImageManifest::parse(json.as_bytes()).unwrap(), good);
        for (from, to) in [(":512", ":513"), (":512", ":0"), ("\"layout\":2", "\"layout\":1"), ("0707", "07")] {
            ImageManifest::parse(json.replacen(from, to, 1).as_bytes()).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn nothing_that_a_file_says_is_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = ImageManifest::parse(&bytes);
            let _ = DiskManifest::parse(&bytes);
        }

        #[test]
        fn what_parses_is_within_its_bounds(layers in 0_usize..80, cut in any::<prop::sample::Index>()) {
            let json = serde_json::to_vec(&disk(layers)).unwrap();
            prop_assert_eq!(DiskManifest::parse(&json).is_ok(), layers <= MAX_LAYERS);
            prop_assert!(DiskManifest::parse(&json[..cut.index(json.len())]).is_err());
        }
    }
}
