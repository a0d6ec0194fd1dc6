//! Keeps listeners alive: one that fails or panics is logged and opened again, and disturbs no other.

use assay_service::error::chain;
use std::error::Error;
use std::pin::Pin;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Serving: ends with `shutdown`, or with an error.
pub type Serving = Pin<Box<dyn Future<Output = Result<(), BoxedError>> + Send>>;
/// Any listener's error.
pub type BoxedError = Box<dyn Error + Send + Sync>;

/// Runs `first`, then whatever `open` opens, until `shutdown`. Opening is tried again after a pause that doubles from
/// a second to half a minute, and is a second again once a listener has served for a minute.
pub async fn supervise(
    name: String,
    first: Serving,
    open: impl Fn() -> Result<Serving, BoxedError> + Send,
    shutdown: CancellationToken,
) {
    let mut serving = Ok(first);
    let mut pause = FIRST_PAUSE;
    loop {
        let begun = tokio::time::Instant::now();
        let failed: BoxedError = match serving {
            Ok(serving) => match tokio::spawn(serving).await {
                Ok(Ok(())) if shutdown.is_cancelled() => return,
                Ok(Ok(())) => "it ended by itself".into(),
                Ok(Err(error)) => error,
                Err(panicked) => panicked.into(),
            },
            Err(error) => error,
        };
        if begun.elapsed() > PROVEN {
            pause = FIRST_PAUSE;
        }
        let pause_ms = pause.as_millis();
        tracing::error!(
            event = "listener.failed",
            listener = name,
            error = chain(&*failed),
            pause_ms,
            "a listener failed and is opened again after a pause"
        );
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        serving = open();
    }
}

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const PROVEN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn row_16_a_panic_in_one_listener_stops_neither_it_nor_another() {
        let shutdown = CancellationToken::new();
        let opened = Arc::new(AtomicU32::new(0));
        let (second, opened_again) = oneshot::channel();
        let second = std::sync::Mutex::new(Some(second));
        let count = Arc::clone(&opened);
        let until = shutdown.clone();
        let open = move || -> Result<Serving, BoxedError> {
            if count.fetch_add(1, Ordering::SeqCst) == 0 {
                return Ok(Box::pin(async { Err("broken socket".into()) }));
            }
            let _ = second.lock().unwrap().take().unwrap().send(());
            let until = until.clone();
            Ok(Box::pin(async move {
                until.cancelled().await;
                Ok(())
            }))
        };
        let other_until = shutdown.clone();
        let other = tokio::spawn(supervise(
            "other".into(),
            Box::pin(async move {
                other_until.cancelled().await;
                Ok(())
            }),
            || panic!("the other listener was opened again"),
            shutdown.clone(),
        ));
        let panics = Box::pin(async { panic!("injected") });
        let supervised = tokio::spawn(supervise("test".into(), panics, open, shutdown.clone()));
        tokio::time::timeout(Duration::from_secs(20), opened_again).await.expect("it is opened again").unwrap();
        assert_eq!(opened.load(Ordering::SeqCst), 2, "after the panic, and after the error");
        assert!(!other.is_finished());
        shutdown.cancel();
        supervised.await.unwrap();
        other.await.unwrap();
    }
}
