//! Listener and client together, over real sockets.

#![expect(clippy::unwrap_used, reason = "a test's set-up fails loudly")]

use assay_service::CancellationToken;
use assay_service::auth::{Caller, Token, Tokens};
use assay_service::client::{ClientError, ServiceClient};
use assay_service::clock::SystemClock;
use assay_service::error::ApiError;
use assay_service::http::{self, Listener, ServiceContext};
use assay_service::tls::SiteIdentity;
use axum::{Json, Router, routing::get};
use std::path::Path;
use std::sync::Arc;

fn context(folder: &Path) -> ServiceContext {
    ServiceContext {
        clock: Arc::new(SystemClock),
        tokens: Arc::new(Tokens::load_or_create(folder).unwrap()),
        identity: Arc::new(SiteIdentity::load_or_create(folder, &[]).unwrap()),
        shutdown: CancellationToken::new(),
    }
}

fn router() -> Router {
    let whoami = |caller: Caller| async move { caller.require_operator().map(|()| Json(caller.name)) };
    let gone = || async { Err::<Json<()>, _>(ApiError::not_found("node `n9`").with_hint("list nodes")) };
    Router::new().route("/whoami", get(whoami)).route("/gone", get(gone))
}

#[tokio::test]
async fn tls_tokens_and_problems() {
    let folder = tempfile::tempdir().unwrap();
    let context = context(folder.path());
    let tcp = http::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let base: url::Url = format!("https://{}/", tcp.local_addr().unwrap()).parse().unwrap();
    let server = tokio::spawn({
        let context = context.clone();
        async move { http::serve(Listener::Tls(tcp), router(), &context).await }
    });
    let token = |name: &str| Token::from_text(&std::fs::read_to_string(folder.path().join(name)).unwrap());
    let client = |token| ServiceClient::new(base.clone(), context.identity.ca_pem(), token).unwrap();

    let operator = client(token("operator.token"));
    assert_eq!(operator.get::<String>("/whoami").await.unwrap(), "operator");
    let problem = operator.get::<()>("/gone").await.unwrap_err();
    assert_eq!(problem.problem().unwrap().hint.as_deref(), Some("list nodes"));
    let status = |error: ClientError| error.problem().unwrap().status;
    assert_eq!(status(client(token("service.token")).get::<String>("/whoami").await.unwrap_err()), 403);
    assert_eq!(status(client(Token::random()).get::<String>("/whoami").await.unwrap_err()), 401);

    let other_site = tempfile::tempdir().unwrap();
    let other_ca = SiteIdentity::load_or_create(other_site.path(), &[]).unwrap();
    let stranger = ServiceClient::new(base.clone(), other_ca.ca_pem(), token("operator.token")).unwrap();
    assert!(matches!(stranger.get::<String>("/whoami").await, Err(ClientError::Unreachable { .. })));

    context.shutdown.cancel();
    server.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_unix_socket_is_private_and_replaces_a_stale_one() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let context = context(folder.path());
    let path = folder.path().join("control.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = tokio::spawn({
        let (context, path) = (context.clone(), path.clone());
        async move { http::serve(Listener::Unix(path), router(), &context).await }
    });
    let client = ServiceClient::over_unix(&path).unwrap();
    // The stale file exists before the server listens: retry until the connection is accepted.
    let status = loop {
        match client.get::<()>("/gone").await {
            Err(ClientError::Refused { problem, .. }) => break problem.status,
            Err(_not_yet) => tokio::task::yield_now().await,
            Ok(()) => unreachable!("the route always refuses"),
        }
    };
    assert_eq!(status, 404);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    context.shutdown.cancel();
    server.await.unwrap().unwrap();
}
