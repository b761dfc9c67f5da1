//! A cluster that there is in etcd only.

use std::time::Duration;

use anyhow::Result;
use trunkline_common::dcs::codec::encode_member;
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::{LeaseId, Member, MemberName, SystemClock};
use trunkline_config::local::Etcd as EtcdConfig;

use crate::Etcd;

/// Says in etcd that the leader of `scope` listens on `port` of this machine, and takes writes.
///
/// # Errors
/// etcd does not take it.
pub async fn announce(etcd: &Etcd, scope: &str, port: u16) -> Result<()> {
    let endpoints = etcd.endpoints().iter().map(|endpoint| format!("http://{endpoint}")).collect();
    let config = EtcdConfig { endpoints, ..EtcdConfig::default() };
    let dcs = EtcdDcs::connect(&config, SystemClock, Duration::from_secs(5)).await?;
    let store = ClusterStore::new(dcs, Paths::new("service", scope));
    let name = MemberName::from("peer");
    let member = Member {
        conn_url: Some(format!("postgres://127.0.0.1:{port}/postgres")),
        state: "running".to_owned(),
        role: "primary".to_owned(),
        ..Member::default()
    };
    store.put_member(&name, &encode_member(&member), LeaseId(0)).await?;
    store.take_leader(&name, LeaseId(0)).await?;
    Ok(())
}
