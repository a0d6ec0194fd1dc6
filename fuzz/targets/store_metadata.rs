#![no_main]
//! What the local store keeps beside its files: manifests of images and disks, and the header of an allocation map. What
//! is accepted is within its bounds, and says the same when it is written again.

use assay_imaging::store::manifest::{DiskManifest, ImageManifest, MAX_LAYERS};
use assay_imaging::store::overlay::parse_header;
use assay_imaging::store::qcow2::MAX_VIRTUAL_BYTES;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(image) = ImageManifest::parse(bytes) {
        assert!((512..=MAX_VIRTUAL_BYTES).contains(&image.virtual_bytes));
        assert!(image.chain().layers.len() <= MAX_LAYERS);
        let again = serde_json::to_vec(&image).unwrap_or_default();
        assert_eq!(ImageManifest::parse(&again), Ok(image));
    }
    if let Ok(disk) = DiskManifest::parse(bytes) {
        assert!(disk.chain.layers.len() <= MAX_LAYERS && !disk.chain.layers.contains(&disk.top));
        let again = serde_json::to_vec(&disk).unwrap_or_default();
        assert_eq!(DiskManifest::parse(&again), Ok(disk));
    }
    let _ = parse_header(bytes);
});
