//! Clients' addresses through several proxies, HAProxy among them.

use std::fmt::Display;

use anyhow::{Result, ensure};
use serde_json::json;
use trunkline_tests::tools::find_program;
use trunkline_tests::{LIMIT, Lab, Program, Proxy, made_up, proxy, rest, wait};

use crate::ports::{connect, scene};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_haproxy_and_in_front_of_it_clients_keep_their_addresses() -> Result<()> {
    let port_of = |lab: &Lab| lab.port();
    let behind = std::cell::Cell::new(0);
    let more = |lab: &Lab| {
        behind.set(port_of(lab)?);
        let listen = format!("127.0.0.1:{}", behind.get());
        let accept = json!({"accept_from": ["127.0.0.1"]});
        Ok(vec![json!({"name": "behind", "listen": listen, "target": "leader", "proxy_protocol": accept})])
    };
    let scene = scene("proxied", more).await?;
    let (lab, ports) = (&scene.lab, proxy::Ports::any(&scene.lab)?);
    let mut haproxy = Program::new(find_program("haproxy", "haproxy")?);
    haproxy.args = ["-db", "-f"].map(Into::into).into();
    let listen = |name: &str, bind: &dyn Display, how: &str| {
        format!("listen {name}\n bind 127.0.0.1:{bind}\n server router 127.0.0.1:{} {how}\n", behind.get())
    };
    let told = lab.port()?;
    let config = format!(
        "defaults\n mode tcp\n timeout client 1m\n timeout connect 5s\n timeout server 1m\n{}{}{}{}",
        listen("one", &ports.read_write, "send-proxy"),
        listen("two", &ports.read_only, "send-proxy-v2"),
        listen("checked", &ports.admin, "send-proxy-v2 check-send-proxy check inter 100ms"),
        listen("told", &format!("{told} accept-proxy"), "send-proxy-v2"),
    );
    let _haproxy = Proxy::start(lab, "haproxy", haproxy, ports, &config).await?;
    // And a router in front of HAProxy, which believes what that says.
    made_up::announce(&scene.etcd, "front", told).await?;
    let front = proxy::Ports::any(lab)?;
    let sends = |name: &str, port: u16, version: &str| {
        let sent = json!({"send": version});
        json!({"name": name, "listen": format!("127.0.0.1:{port}"), "target": "leader", "proxy_protocol": sent})
    };
    let extra = json!({"ports": [sends("v1", front.read_write, "v1"), sends("v2", front.read_only, "v2")]});
    let endpoints = scene.etcd.endpoints();
    let _front = Proxy::router(lab, Program::router()?, front, "front", &endpoints, &extra).await?;
    for port in [ports.read_write, ports.read_only, ports.admin, front.read_write, front.read_only] {
        let mut client = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        tokio::io::AsyncWriteExt::write_all(&mut client, b"\0\0\0\x17\0\x03\0\0user\0postgres\0\0").await?;
        let own = client.local_addr()?.to_string();
        let known = wait::until("the client to be known by its address", LIMIT, async || {
            let path = format!("/sessions?port=behind&client={own}");
            let sessions = rest::get(scene.router.ports().admin, &path).await?.body;
            ensure!(sessions["sessions"].as_array().is_some_and(|list| list.len() == 1), "{sessions}");
            Ok(())
        });
        known.await?;
    }
    for port in [ports.read_write, front.read_write, front.read_only] {
        connect(&scene, port, "").await?;
    }
    scene.lab.success();
    Ok(())
}
