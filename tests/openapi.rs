//! The OpenAPI documents in git are those that the code generates.

#![expect(clippy::unwrap_used, reason = "a test's set-up fails loudly")]

use std::fs;
use std::path::Path;

/// Compares with `docs/openapi/<service>.json`; with `ASSAY_UPDATE_OPENAPI=1` writes it (`make openapi`).
fn check(service: &str, document: &utoipa::openapi::OpenApi) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/openapi/{service}.json"));
    let generated = document.to_pretty_json().unwrap() + "\n";
    if std::env::var_os("ASSAY_UPDATE_OPENAPI").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &generated).unwrap();
    }
    let in_git = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(in_git, generated, "{} is out of date: run `make openapi` and commit", path.display());
}

#[test]
fn verifier() {
    check("verifier", &assay_verifier::openapi());
}

#[test]
fn isolation() {
    check("isolation", &assay_isolation::openapi());
}

#[test]
fn imaging() {
    check("imaging", &assay_imaging::openapi());
}
