//! `remove`: forget a cluster.

use super::args::RemoveArgs;
use super::context::Context;
use super::error::{CtlError, Result};
use super::list::show_members;
use super::prompt::ask;

/// What has to be typed.
const PHRASE: &str = "Yes I am aware";

/// `remove`: three questions, then every key of the cluster is deleted. There is no way round the questions.
pub(super) async fn remove(context: &Context, args: &RemoveArgs) -> Result<()> {
    let target = context.target(&args.cluster, args.group);
    let cluster = target.read().await?;
    cluster.one_group_only()?;
    show_members(&cluster, false, args.format.into())?;
    if ask("Please confirm the cluster name to remove", None)? != args.cluster {
        return Err(CtlError::new("Cluster names specified do not match"));
    }
    let name = &args.cluster;
    let question = format!("You are about to remove all information in DCS for {name}, please type: \"{PHRASE}\"");
    if ask(&question, None)? != PHRASE {
        return Err(CtlError::new(format!("You did not exactly type \"{PHRASE}\"")));
    }
    if let Some(leader) = cluster.view.leader.as_ref().filter(|leader| !leader.name.as_str().is_empty()) {
        let question = "This cluster currently is healthy. Please specify the leader name to continue";
        if ask(question, None)? != leader.name.as_str() {
            return Err(CtlError::new("You did not specify the current leader of the cluster"));
        }
    }
    target.store.delete_cluster().await.map_err(|error| target.error(&error))
}
