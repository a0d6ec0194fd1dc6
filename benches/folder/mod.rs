//! Where benchmarks put their files.

/// A folder below `target/tmp`, gone when dropped. The file system under that is what is measured.
pub(crate) fn folder(prefix: &str) -> tempfile::TempDir {
    std::fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    tempfile::Builder::new().prefix(prefix).tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}
