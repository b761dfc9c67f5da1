//! Who may do what, and TLS.

use trunkline_config::Secret;
use trunkline_config::local::VerifyClient;

use super::*;
use crate::peer::Peers;

#[tokio::test]
async fn unsafe_requests_need_the_password() {
    let mut guarded = local("pg-a");
    guarded.restapi.authentication = Some(("admin".into(), Secret::new("s3cret")));
    let mut node = Node::start(guarded.clone(), PgStatus::Running(primary()), board("primary")).await;
    node.on_command(|_| {});
    assert_eq!(node.code("POST", "/reload", None).await, 401);
    assert_eq!(node.code("PATCH", "/config", Some(json!({"ttl": 20}))).await, 401);
    assert_eq!(node.get("/config").await.0, 200, "reading is safe");
    let reload = |local: Local| async move {
        let client = RestClient::for_agent(&local).unwrap();
        client
            .request("POST", &format!("http://{}/reload", node.address), None, Duration::from_secs(5))
            .await
            .unwrap()
            .status
    };
    assert_eq!(reload(guarded.clone()).await, 202);
}

#[tokio::test]
async fn whoever_asks_the_members_has_the_password_of_the_last_reload() {
    let with = |password: &str| {
        let mut local = local("pg-a");
        local.restapi.authentication = Some(("admin".into(), Secret::new(password)));
        local
    };
    let mut node = Node::start(with("first"), PgStatus::Running(standby()), board("replica")).await;
    put(&node.store, "config", json!({"failsafe_mode": true})).await;
    node.catch_up().await;
    node.on_command(|command| {
        if let Command::FailsafePoll { reply, .. } = command {
            let _ = reply.send(crate::node::Word::Given);
        }
    });
    // As the HA loop has them, from before the reload on.
    let peers = node.api.peers();
    let asked = || {
        let everybody = BTreeMap::from([(MemberName::from("pg-a"), node.url("/patroni"))]);
        peers.failsafe(everybody, json!({"name": "pg-b"}), Duration::from_secs(5))
    };
    for password in ["first", "second"] {
        node.api.reload(&with(password)).unwrap();
        let answers = asked().await;
        assert!(answers.values().all(|answer| answer.accepted), "{password}: {answers:?}");
    }
}

#[tokio::test]
async fn unsafe_requests_come_from_the_allowlist() {
    let mut guarded = local("pg-a");
    guarded.restapi.allowlist = vec!["10.0.0.0/8".into()];
    let mut node = Node::start(guarded.clone(), PgStatus::Running(primary()), board("primary")).await;
    node.on_command(|_| {});
    assert_eq!(node.code("POST", "/reload", None).await, 403);
    guarded.restapi.allowlist = vec!["10.0.0.0/8".into(), "localhost".into()];
    node.api.reload(&guarded).unwrap();
    assert_eq!(node.code("POST", "/reload", None).await, 202, "the list was read again");
    guarded.restapi.allowlist = Vec::new();
    guarded.restapi.allowlist_include_members = true;
    node.api.reload(&guarded).unwrap();
    assert_eq!(node.code("POST", "/reload", None).await, 403, "not a member");
    put(&node.store, "pg-x", json!({"api_url": "http://127.0.0.1:8008/patroni"})).await;
    node.catch_up().await;
    assert_eq!(node.code("POST", "/reload", None).await, 202);
}

/// A directory with `one.pem` and `two.pem`: each self-signed, CA and end entity at once, with its key in the same file.
fn certificates() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        let new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -addext";
        let rest = format!("subjectAltName=IP:127.0.0.1 -subj /CN={name} -keyout {name}.pem -out {name}.crt");
        let arguments = format!("{new} {rest}");
        let openssl = std::process::Command::new("openssl").args(arguments.split(' ')).current_dir(dir.path()).output();
        assert!(openssl.unwrap().status.success());
        let certificate = std::fs::read_to_string(dir.path().join(format!("{name}.crt"))).unwrap();
        let file = dir.path().join(format!("{name}.pem"));
        std::fs::write(&file, std::fs::read_to_string(&file).unwrap() + &certificate).unwrap();
    }
    dir
}

/// A node with one file as CA, server and client certificate, and a client's answer to `method /path`; 0 = no answer.
async fn secured(node: &Node, client: &Local, method: &str, path: &str) -> u16 {
    let url = format!("https://{}{path}", node.address);
    let client = RestClient::for_agent(client).unwrap();
    client.request(method, &url, None, Duration::from_secs(5)).await.map_or(0, |answer| answer.status)
}

#[tokio::test]
async fn client_certificates_as_configured() {
    let dir = certificates();
    let pem = |name: &str| Some(dir.path().join(name));
    let mut config = local("pg-a");
    config.restapi.certfile = pem("one.pem");
    config.restapi.cafile = pem("one.pem");
    config.restapi.https_extra_headers = vec![("Strict-Transport-Security".into(), "max-age=1".into())];
    let mut with = config.clone();
    (with.ctl.certfile, with.ctl.cacert) = (pem("one.pem"), pem("one.pem"));
    let mut stranger = config.clone();
    (stranger.ctl.certfile, stranger.ctl.cacert) = (pem("two.pem"), pem("one.pem"));
    let without = config.clone();

    let mut node = Node::start(config.clone(), PgStatus::Running(primary()), board("primary")).await;
    node.on_command(|_| {});
    use VerifyClient::{None, Optional, Required};
    let table = [
        (None, "without", &without, 200, 202),
        (None, "with", &with, 200, 202),
        (Optional, "without", &without, 200, 403),
        (Optional, "with", &with, 200, 202),
        (Optional, "a stranger's", &stranger, 0, 0),
        (Required, "without", &without, 0, 0),
        (Required, "with", &with, 200, 202),
        (Required, "a stranger's", &stranger, 0, 0),
    ];
    for (verify, name, client, safe, change) in table {
        config.restapi.verify_client = verify;
        node.api.reload(&config).unwrap();
        let codes = (secured(&node, client, "GET", "/patroni").await, secured(&node, client, "POST", "/reload").await);
        assert_eq!(codes, (safe, change), "{verify:?} {name}");
    }
}

#[tokio::test]
async fn a_new_certificate_comes_with_a_reload() {
    let dir = certificates();
    let pem = |name: &str| Some(dir.path().join(name));
    let mut config = local("pg-a");
    config.restapi.certfile = pem("one.pem");
    // With a client certificate the server's is checked.
    let mut client = local("client");
    (client.ctl.certfile, client.ctl.cacert) = (pem("two.pem"), pem("two.pem"));
    let node = Node::start(config.clone(), PgStatus::Running(primary()), board("primary")).await;
    assert_eq!(secured(&node, &client, "GET", "/patroni").await, 0, "not signed by the client's CA");
    config.restapi.certfile = pem("two.pem");
    node.api.reload(&config).unwrap();
    assert_eq!(secured(&node, &client, "GET", "/patroni").await, 200);

    config.restapi.certfile = pem("missing.pem");
    let error = node.api.reload(&config).unwrap_err().to_string();
    assert!(error.contains("missing.pem"), "{error}");
    assert_eq!(secured(&node, &client, "GET", "/patroni").await, 200, "the old one stays in force");
}

#[tokio::test]
async fn plain_http_on_a_tls_port_is_closed() {
    let dir = certificates();
    let mut config = local("pg-a");
    config.restapi.certfile = Some(dir.path().join("one.pem"));
    let node = Node::start(config, PgStatus::Running(primary()), board("primary")).await;
    let answer = node.raw(b"GET /patroni HTTP/1.0\r\n\r\n").await;
    assert!(!answer.contains("HTTP/"), "{answer}");
}
