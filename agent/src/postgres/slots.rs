//! Physical replication slots (ha-loop §16.2). Which ones there shall be is decided elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio_postgres::Client;
use trunkline_common::Lsn;

use super::instance::Instance;
use super::{PgError, query};

/// The bound on all of it.
const LIMIT: Duration = Duration::from_secs(10);

/// A slot as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    active: bool,
    restart: Option<Lsn>,
    /// Holds back vacuum: left over from a standby with hot_standby_feedback.
    has_xmin: bool,
    /// `wal_status = lost`: useless for ever.
    lost: bool,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Create(String),
    Drop(String),
    Advance(String, Lsn),
}

/// What leads from the slots there are to those wanted.
fn plan(present: &BTreeMap<String, Slot>, wanted: &BTreeMap<String, Option<Lsn>>) -> Vec<Step> {
    let mut steps = Vec::new();
    for (name, slot) in present {
        // A slot in use can't be dropped, and needs nothing: it moves by itself.
        if slot.active {
            continue;
        }
        let Some(position) = wanted.get(name) else {
            steps.push(Step::Drop(name.clone()));
            continue;
        };
        // A position means: nobody streams from it here, it only keeps WAL. Then an xmin is left over, and without a
        // restart position nothing can be advanced.
        let unusable = position.is_some() && (slot.has_xmin || slot.restart.is_none());
        match position {
            _ if slot.lost || unusable => steps.extend([Step::Drop(name.clone()), Step::Create(name.clone())]),
            Some(to) if slot.restart.is_some_and(|at| at < *to) => steps.push(Step::Advance(name.clone(), *to)),
            _ => {}
        }
    }
    steps.extend(wanted.keys().filter(|name| !present.contains_key(*name)).map(|name| Step::Create(name.clone())));
    steps
}

impl Instance {
    pub(super) async fn apply_slots(&self, wanted: BTreeMap<String, Option<Lsn>>) -> Result<(), PgError> {
        let work = async {
            let session = self.session(LIMIT).await?;
            let client = session.client();
            let present = present(client, self.version()).await?;
            let mut failure = None;
            // Each by itself: one that is in use must not keep the others from being made.
            for step in plan(&present, &wanted) {
                match carry_out(client, &step).await {
                    Ok(()) => tracing::info!("slot: {step:?}"),
                    Err(error) => {
                        tracing::warn!("slot: {step:?}: {error}");
                        failure = Some(error);
                    }
                }
            }
            failure.map_or(Ok(()), Err)
        };
        let timeout = PgError::Timeout { what: "changing slots".to_owned(), limit: LIMIT };
        tokio::time::timeout(LIMIT, work).await.unwrap_or(Err(timeout))
    }
}

async fn present(client: &Client, version: u32) -> Result<BTreeMap<String, Slot>, PgError> {
    let lost = if version >= 13 { "coalesce(wal_status = 'lost', false)" } else { "false" };
    let text = format!(
        "SELECT slot_name::text, active, restart_lsn::text, xmin IS NOT NULL, {lost}
           FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary"
    );
    let rows = client.query(&text, &[]).await.map_err(query::failed)?;
    let slot = |row: &tokio_postgres::Row| {
        let restart: Option<String> = row.try_get(2)?;
        let restart = restart.and_then(|lsn| lsn.parse().ok());
        let slot = Slot { active: row.try_get(1)?, restart, has_xmin: row.try_get(3)?, lost: row.try_get(4)? };
        Ok((row.try_get(0)?, slot))
    };
    rows.iter().map(slot).collect::<Result<_, _>>().map_err(query::failed)
}

async fn carry_out(client: &Client, step: &Step) -> Result<(), PgError> {
    match step {
        // Only where it isn't there: the list may be older than a create beside us. WAL is kept from now on.
        Step::Create(name) => client.execute("SELECT pg_create_physical_replication_slot($1, true)", &[name]).await,
        // Somebody may have connected since the list was read; then it goes once its user does.
        Step::Drop(name) => {
            let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
                WHERE slot_name = $1 AND slot_type = 'physical' AND NOT active";
            client.execute(drop, &[name]).await
        }
        Step::Advance(name, to) => {
            // Never past what this server has; on a standby that is what it has replayed.
            let advance = "SELECT pg_replication_slot_advance($1, least($2::text::pg_lsn,
                CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END))";
            client.execute(advance, &[name, &to.to_string()]).await
        }
    }
    .map(drop)
    .map_err(query::failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans() {
        let slot = Slot { active: false, restart: Some(Lsn(10)), has_xmin: false, lost: false };
        let (create, drop) = (Step::Create("a".into()), Step::Drop("a".into()));
        for (what, present, wanted, steps) in [
            ("missing", None, Some(None), vec![create.clone()]),
            ("not wanted", Some(slot.clone()), None, vec![drop.clone()]),
            ("there", Some(slot.clone()), Some(None), vec![]),
            ("behind", Some(slot.clone()), Some(Some(Lsn(20))), vec![Step::Advance("a".into(), Lsn(20))]),
            ("ahead", Some(slot.clone()), Some(Some(Lsn(5))), vec![]),
            ("in use", Some(Slot { active: true, ..slot.clone() }), Some(Some(Lsn(20))), vec![]),
            ("in use, not wanted", Some(Slot { active: true, ..slot.clone() }), None, vec![]),
            ("lost", Some(Slot { lost: true, ..slot.clone() }), Some(None), vec![drop.clone(), create.clone()]),
            ("left over xmin", Some(Slot { has_xmin: true, ..slot.clone() }), Some(Some(Lsn(5))), vec![drop, create]),
            ("xmin of a standby", Some(Slot { has_xmin: true, ..slot }), Some(None), vec![]),
        ] {
            let present = present.map(|slot| ("a".to_owned(), slot)).into_iter().collect();
            let wanted = wanted.map(|position| ("a".to_owned(), position)).into_iter().collect();
            assert_eq!(plan(&present, &wanted), steps, "{what}");
        }
    }
}
