//! HTTP itself: methods, garbage, old versions, connections.

use super::*;

#[tokio::test]
async fn status_only_methods_go_to_the_health_tables() {
    let node = Node::start(local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    for (method, path, expected) in [
        ("OPTIONS", "/replica", 200),
        ("HEAD", "/replica", 200),
        ("OPTIONS", "/", 503),
        ("HEAD", "/patroni", 503),
        ("HEAD", "/liveness", 503),
        ("HEAD", "/metrics", 503),
    ] {
        assert_eq!(node.request(method, path, None).await, (expected, String::new()), "{method} {path}");
    }
    for (method, path) in
        [("POST", "/"), ("DELETE", "/config"), ("TRACE", "/patroni"), ("BREW", "/config"), ("PUT", "/x")]
    {
        assert_eq!(node.code(method, path, None).await, 501, "{method} {path}");
    }
}

#[tokio::test]
async fn garbage_gets_a_status_and_a_sentence() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let post = |headers: &str, body: &str| format!("POST /switchover HTTP/1.0\r\n{headers}\r\n{body}").into_bytes();
    let huge = format!("Content-Length: {}\r\n", 1u64 << 40);
    let table = [
        (post("", ""), "411"),
        (post("Content-Length: 0\r\n", ""), "400"),
        (post("Content-Length: 2\r\n", "{}"), "400"),
        (post("Content-Length: 3\r\n", "{x}"), "400"),
        (post("Content-Length: 2\r\n", "[]"), "400"),
        (post("Content-Length: x\r\n", "{}"), "400"),
        (post("Content-Length: 9\r\n", "{}"), "400"),
        (post(&huge, "{}"), "413"),
        (post("Content-Length: 5\r\n", "{\"a\":"), "400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), "400"),
        (b"nonsense\r\n\r\n".to_vec(), "400"),
        (format!("GET /{} HTTP/1.0\r\n\r\n", "x".repeat(100_000)).into_bytes(), "414"),
    ];
    for (request, status) in table {
        let answer = node.raw(&request).await;
        let shown = String::from_utf8_lossy(&request[..request.len().min(80)]).into_owned();
        assert!(answer.split(' ').nth(1) == Some(status), "{shown:?} -> {answer}");
    }
    assert_eq!(node.get("/health").await.0, 200, "and it goes on");
}

#[tokio::test]
async fn a_load_balancer_of_http_1_0() {
    let node = Node::start(local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    let answer = node.raw(b"OPTIONS /replica HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    let answer = node.raw(b"GET /primary HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 503 Service Unavailable\r\n"), "{answer}");
}

#[tokio::test]
async fn silent_clients_hold_nothing_up() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(node.address).await.unwrap());
    }
    let answered = tokio::time::timeout(Duration::from_secs(5), node.get("/health")).await;
    assert_eq!(answered.unwrap().0, 200);
}

#[tokio::test]
async fn a_new_address_comes_with_a_reload() {
    let mut config = local("pg-a");
    let node = Node::start(config.clone(), PgStatus::Running(primary()), board("primary")).await;
    config.restapi.listen = "203.0.113.77:0".into();
    let error = node.api.reload(&config).unwrap_err().to_string();
    assert!(error.contains("this host has no such address"), "{error}");
    assert_eq!(node.get("/health").await.0, 200, "an address that can't be used changes nothing");
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    config.restapi.listen = free.to_string();
    node.api.reload(&config).unwrap();
    let deadline = SystemClock.now() + Duration::from_secs(5);
    while TcpStream::connect(free).await.is_err() {
        assert!(SystemClock.now() < deadline, "{free} is not listened on");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_end_closes_the_port_and_what_is_idle() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let server = Server::bind(node.api.clone()).await.unwrap();
    let address = server.local_addr().unwrap();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(server.run(async { drop(ended.await) }));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    end.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(3), running).await.unwrap().unwrap();
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(3), stream.read_to_end(&mut rest)).await;
    assert!(closed.is_ok(), "the connection is closed, too");
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}
