//! Real quotes with the collateral of their time, from the package of `dcap-qvl` in Cargo's registry: for tests.

use std::path::PathBuf;

/// When quotes and collateral were good: seconds since the Unix epoch.
pub const GOOD_AT: i64 = 1_751_000_000;

/// The folder of `tdx_quote`, `sgx_quote` and a `_collateral.json` of each. Where the package is not unpacked, says so
/// and gives none.
#[must_use]
pub fn folder() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))?;
    let registries = std::fs::read_dir(home.join("registry/src")).ok();
    let packages =
        registries.into_iter().flatten().flatten().filter_map(|registry| std::fs::read_dir(registry.path()).ok());
    let ours = |name: &str| name.starts_with("dcap-qvl-0.7");
    let package = packages
        .flatten()
        .flatten()
        .find(|package| ours(&package.file_name().to_string_lossy()) && package.path().join("sample").exists());
    if package.is_none() {
        eprintln!("skipped: dcap-qvl's package is not in {}", home.display());
    }
    package.map(|package| package.path().join("sample"))
}
