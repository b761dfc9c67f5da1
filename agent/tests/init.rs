//! What process 1 of a container owes the others, in a process that is given orphans as it is. One test: it reaps whoever
//! there is.

use std::process::{Command, ExitCode};

#[test]
fn orphans_are_reaped_signals_passed_on_and_the_code_is_the_childs() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("allowed");
    // An orphan that nobody has reaped can still be sent a signal.
    let script = "( sleep 0.2 & echo $! ) > $0; orphan=$(cat $0); while kill -0 $orphan 2>/dev/null; do sleep 0.02; done; exit 7";
    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut orphans = Command::new("timeout");
    orphans.args(["20", "sh", "-c", script]).arg(file.path());
    assert_eq!(trunkline_agent::init::run(&mut orphans).expect("started"), ExitCode::from(7));

    let mut killed = Command::new("sh");
    killed.args(["-c", "kill -KILL $$"]);
    assert_eq!(trunkline_agent::init::run(&mut killed).expect("started"), ExitCode::from(128 + 9));

    // It asks to be told, and is told.
    let script =
        "trap 'exit 5' HUP; (sleep 0.1; kill -HUP $0) & i=0; while [ $i -lt 500 ]; do i=$((i+1)); sleep 0.02; done";
    let mut asks = Command::new("sh");
    asks.args(["-c", script, &std::process::id().to_string()]);
    assert_eq!(trunkline_agent::init::run(&mut asks).expect("started"), ExitCode::from(5));

    let mut nothing = Command::new("/nowhere/nothing");
    assert!(trunkline_agent::init::run(&mut nothing).is_err());
}
