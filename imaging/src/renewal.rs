//! Renewals: fresh attestation results keep exports standing. A batch is decided whole in memory and recorded in one
//! statement; then the gateways are told, so that their own clocks do not end what stands.

use crate::db::exports::ExportRecord;
use crate::export::{ExportError, Exporter};
use assay_service::error::chain;
use assay_wire::agreement::{Batch, Disagreement};
use assay_wire::id::{AdmissionId, ProjectId};
use assay_wire::isolation::{Renewal, RenewalOutcome};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

impl Exporter {
    /// Decides a batch and records it. One outcome for each renewal, in their order. None if deciding panicked: then,
    /// as after an error, no export stands longer than it did.
    pub(crate) async fn renew(
        &self,
        renewals: Vec<Renewal>,
        longest: Duration,
        now_ms: i64,
    ) -> Result<Option<Vec<RenewalOutcome>>, ExportError> {
        let records: HashMap<AdmissionId, ExportRecord> =
            self.db.exports().await?.into_iter().map(|record| (record.admission, record)).collect();
        let batch = Batch {
            agreement: self.agreement.clone(),
            longest_ms: i64::try_from(longest.as_millis()).unwrap_or(i64::MAX),
            standing: records.iter().filter_map(|(id, record)| Some((*id, record.standing()?))).collect(),
            keys: self.db.all_trusted_keys().await?,
        };
        // A thousand signatures take tens of milliseconds: not on a thread that serves others.
        let deciding = tokio::task::spawn_blocking(move || batch.decide(renewals, now_ms));
        let Ok(decided) = deciding.await else { return Ok(None) };
        let mut until_ms = decided.until_ms();
        let extended = self.db.extend(&until_ms, now_ms).await?;
        until_ms.retain(|id, _| extended.contains(id));
        self.tell_gateways(&until_ms, &records).await?;
        Ok(Some(decided.outcomes(&until_ms, |refused: &Disagreement| chain(refused))))
    }

    /// One order a gateway. One that does not answer is told by reconciliation as soon as it does.
    async fn tell_gateways(
        &self,
        until_ms: &BTreeMap<AdmissionId, i64>,
        records: &HashMap<AdmissionId, ExportRecord>,
    ) -> Result<(), ExportError> {
        let mut by_project: BTreeMap<&ProjectId, BTreeMap<AdmissionId, i64>> = BTreeMap::new();
        for (id, until_ms) in until_ms {
            if let Some(record) = records.get(id) {
                by_project.entry(&record.project).or_default().insert(*id, *until_ms);
            }
        }
        let gateways = self.db.gateways().await?;
        let orders = by_project.into_iter().filter_map(|(project, renewed)| {
            let gateway = gateways.iter().find(|gateway| gateway.project == *project)?;
            Some(async move {
                if let Err(error) = self.gateways.renew(gateway, &renewed).await {
                    tracing::warn!(event = "gateway.not_renewed", %project, cause = chain(&error),
                        "a gateway was not told of renewals: it will be when it is reconciled");
                }
            })
        });
        futures_util::future::join_all(orders).await;
        Ok(())
    }
}
