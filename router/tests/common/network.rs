//! A network of a test's own, whose packets can be dropped. That takes root, and nft.

use std::process::Command;

/// Set in the process inside.
const INSIDE: &str = "TRUNKLINE_TEST_INSIDE";

/// Whether this is the process inside of a network of its own; else runs the very test there, as a process of its own, or says why not.
pub fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        run("ip", "link set lo up");
        run("nft", "add table inet cuts");
        run("nft", "add chain inet cuts input { type filter hook input priority 0 ; }");
        return true;
    }
    let has_nft = Command::new("nft").arg("--version").output().is_ok_and(|output| output.status.success());
    if !rustix::process::geteuid().is_root() || !has_nft {
        println!("SKIPPED: a network of its own takes root and nft (package nftables)");
        return false;
    }
    let mut command = Command::new("unshare");
    command.args(["--net", "--"]).arg(std::env::current_exe().unwrap()).args([test, "--exact", "--nocapture"]);
    assert!(command.env(INSIDE, "1").status().unwrap().success(), "see above");
    false
}

/// From now on nothing that is sent from a port, or to it, arrives, and nobody is told so.
pub fn cut_off(port: u16) {
    for end in ["sport", "dport"] {
        run("nft", &format!("add rule inet cuts input tcp {end} {port} drop"));
    }
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}
