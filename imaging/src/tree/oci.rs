//! OCI image layouts (image-spec 1.1): which layers an image has, each read against its digest.

use super::TreeError;
use super::model::Model;
use super::tar::{Kind, Reader};
use flate2::read::MultiGzDecoder;
use ring::digest::{Context, SHA256};
use serde::Deserialize;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::Path;

/// Of an index, a manifest: as registries.
const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
const MAX_LAYERS: usize = 256;
/// Of all files of an image together.
const MAX_TREE_BYTES: u64 = 1 << 40;
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A document or layer that another document names.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// `sha256:` and hexadecimal digits.
    pub digest: String,
    /// Octets.
    pub size: u64,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    layers: Vec<Descriptor>,
}

/// Where an image's files are: opens one of a layout by its path, `blobs/sha256/…`.
pub type Open<'a> = &'a dyn Fn(&str) -> io::Result<File>;

/// Adds up the one image of a layout that is for this machine's architecture. Its files' octets go to `octets`. Answers
/// the digest of its manifest, which stands for all of it.
///
/// # Errors
/// The layout is malformed, has several such images, or a blob is not what its digest says.
pub fn read(open: Open<'_>, octets: &Path, model: &mut Model) -> Result<String, TreeError> {
    let index = open("index.json").and_then(|file| bounded(file, MAX_DOCUMENT_BYTES));
    let index = index.map_err(|source| TreeError::io("reading", "index.json", source))?;
    let mut manifest = choose("index.json", &index)?;
    if manifest.media_type == INDEX {
        manifest = choose(&manifest.digest, &document(open, &manifest)?)?;
    }
    if manifest.media_type != MANIFEST {
        return Err(oci(&manifest.digest, format!("`{}` is no image manifest", manifest.media_type)));
    }
    let layers = layers(&manifest.digest, &document(open, &manifest)?)?;
    let mut files = Files { octets, next: 0, left: MAX_TREE_BYTES };
    for layer in &layers {
        model.next_layer();
        let mut blob = Hashed::open(open, layer)?;
        if layer.media_type.ends_with("+gzip") || layer.media_type.ends_with(".gzip") {
            add_all(&mut Reader::new(MultiGzDecoder::new(&mut blob)), model, &mut files)?;
        } else {
            add_all(&mut Reader::new(&mut blob), model, &mut files)?;
        }
        blob.finish()?;
    }
    Ok(hex_of(&manifest.digest)?.to_owned())
}

/// Adds up a tar file, compressed or not.
///
/// # Errors
/// It is malformed.
pub fn read_tar(mut file: File, octets: &Path, model: &mut Model) -> Result<(), TreeError> {
    let mut magic = [0; 2];
    let failed = |source| TreeError::io("reading", "the tar file", source);
    let compressed = file.read(&mut magic).map_err(failed)? == 2 && magic == [0x1f, 0x8b];
    io::Seek::rewind(&mut file).map_err(failed)?;
    let mut files = Files { octets, next: 0, left: MAX_TREE_BYTES };
    if compressed {
        add_all(&mut Reader::new(MultiGzDecoder::new(io::BufReader::new(file))), model, &mut files)
    } else {
        add_all(&mut Reader::new(io::BufReader::new(file)), model, &mut files)
    }
}

/// Where files' octets go, and how many may still come.
struct Files<'a> {
    octets: &'a Path,
    next: u64,
    left: u64,
}

fn add_all<R: Read>(reader: &mut Reader<R>, model: &mut Model, files: &mut Files<'_>) -> Result<(), TreeError> {
    let mut buffer = vec![0; 1 << 16];
    while let Some(entry) = reader.next_entry()? {
        let number = files.next;
        if entry.kind == Kind::File {
            files.left = files.left.checked_sub(entry.size).ok_or(TreeError::TooMuch("1 TiB in all files"))?;
            let path = files.octets.join(number.to_string());
            let failed = |source| TreeError::io("writing", path.clone(), source);
            let mut file = File::create_new(&path).map_err(failed)?;
            files.next += 1;
            loop {
                match reader.read_data(&mut buffer).map_err(|cause| TreeError::Tar(cause.to_string()))? {
                    0 => break,
                    got => file.write_all(&buffer[..got]).map_err(failed)?,
                }
            }
        }
        model.add(entry, number)?;
    }
    Ok(())
}

/// The one descriptor of an index that is for this machine.
///
/// # Errors
/// It is no index, or has none or several.
fn choose(file: &str, bytes: &[u8]) -> Result<Descriptor, TreeError> {
    let index: Index = serde_json::from_slice(bytes).map_err(|cause| oci(file, cause.to_string()))?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let ours = |platform: &Platform| platform.os == "linux" && platform.architecture == architecture;
    let mut fitting = index.manifests.into_iter().filter(|manifest| manifest.platform.as_ref().is_none_or(ours));
    match (fitting.next(), fitting.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(oci(file, format!("has no image for linux/{architecture}"))),
        (Some(_), Some(_)) => {
            Err(oci(file, "has several images; copy the one that you want to a layout of its own".to_owned()))
        }
    }
}

/// The layers of a manifest, lowest first.
///
/// # Errors
/// It is no manifest, or has layers that we cannot read.
pub fn layers(file: &str, bytes: &[u8]) -> Result<Vec<Descriptor>, TreeError> {
    let Manifest { layers } = serde_json::from_slice(bytes).map_err(|cause| oci(file, cause.to_string()))?;
    if layers.len() > MAX_LAYERS {
        return Err(TreeError::TooMuch("256 layers"));
    }
    let known = |kind: &str| {
        kind.starts_with("application/vnd.oci.image.layer.v1.tar")
            && (kind.ends_with(".tar") || kind.ends_with("+gzip"))
            || kind == "application/vnd.docker.image.rootfs.diff.tar.gzip"
    };
    match layers.iter().find(|layer| !known(&layer.media_type)) {
        Some(layer) => Err(oci(file, format!("has a layer of type `{}`; use tar or tar+gzip", layer.media_type))),
        None => layers.iter().try_for_each(|layer| hex_of(&layer.digest).map(drop)).map(|()| layers),
    }
}

/// Reads a document that another one names.
fn document(open: Open<'_>, of: &Descriptor) -> Result<Vec<u8>, TreeError> {
    if of.size > MAX_DOCUMENT_BYTES {
        return Err(TreeError::TooMuch("4 MiB in one document"));
    }
    let mut blob = Hashed::open(open, of)?;
    let mut bytes = Vec::new();
    blob.read_to_end(&mut bytes).map_err(|source| TreeError::io("reading blob", &of.digest, source))?;
    blob.finish()?;
    Ok(bytes)
}

/// A blob that is hashed as it is read. What was made of it counts only once [`Hashed::finish`] has said so.
struct Hashed {
    stream: io::Take<File>,
    hash: Context,
    digest: String,
}

impl Hashed {
    fn open(open: Open<'_>, of: &Descriptor) -> Result<Self, TreeError> {
        let path = format!("blobs/sha256/{}", hex_of(&of.digest)?);
        let file = open(&path).map_err(|source| TreeError::io("opening", path, source))?;
        Ok(Self { stream: file.take(of.size), hash: Context::new(&SHA256), digest: of.digest.clone() })
    }

    fn finish(mut self) -> Result<(), TreeError> {
        let rest = io::copy(&mut self, &mut io::sink());
        rest.map_err(|source| TreeError::io("reading blob", &self.digest, source))?;
        let found = hex::encode(self.hash.finish());
        if hex_of(&self.digest)? == found { Ok(()) } else { Err(TreeError::Digest { expected: self.digest, found }) }
    }
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.stream.read(buffer)?;
        self.hash.update(&buffer[..got]);
        Ok(got)
    }
}

fn hex_of(digest: &str) -> Result<&str, TreeError> {
    let hex = digest.strip_prefix("sha256:").filter(|hex| {
        hex.len() == 64 && hex.bytes().all(|octet| octet.is_ascii_digit() || (b'a'..=b'f').contains(&octet))
    });
    hex.ok_or_else(|| TreeError::name(digest.as_bytes(), "is no SHA-256 digest"))
}

fn bounded(file: File, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn oci(file: &str, problem: String) -> TreeError {
    TreeError::Oci { file: file.chars().take(120).collect(), problem }
}
