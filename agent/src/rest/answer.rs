//! An answer before it is bytes, and the bodies that requests bring.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use serde_json::{Map, Value};
use trunkline_common::dcs::json::python_json;

use super::policy::Policy;

/// The largest request body that is read. A dynamic configuration of this size would not fit into etcd either.
const LARGEST_BODY: usize = 1 << 20;

/// How long a client may take to send its body.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// What to answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: u16,
    headers: Vec<(HeaderName, HeaderValue)>,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// The status says it all: what load balancers read.
    Nothing,
    Text(String),
    Json(Value),
    Metrics(String),
    /// Where Patroni's HTTP server answers by itself: an error page.
    Page(String),
}

impl Answer {
    /// The status alone.
    pub fn code(status: u16) -> Self {
        Self::new(status, Content::Nothing)
    }

    /// A sentence.
    pub fn text(status: u16, sentence: impl Into<String>) -> Self {
        Self::new(status, Content::Text(sentence.into()))
    }

    /// A document.
    pub fn json(status: u16, document: Value) -> Self {
        Self::new(status, Content::Json(document))
    }

    /// Prometheus' text format.
    pub fn metrics(text: String) -> Self {
        Self::new(200, Content::Metrics(text))
    }

    /// An error page with a sentence that says why.
    pub fn page(status: u16, sentence: impl Into<String>) -> Self {
        Self::new(status, Content::Page(sentence.into()))
    }

    /// Adds a header.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    fn new(status: u16, content: Content) -> Self {
        Self { status, headers: Vec::new(), content }
    }

    /// The response on the wire.
    pub fn into_response(self, policy: &Policy) -> Response<Body> {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let (content_type, body, extra) = match self.content {
            Content::Nothing => (None, String::new(), false),
            Content::Text(text) => (Some("text/html"), text, true),
            Content::Json(document) => (Some("application/json"), python_json(&document), true),
            Content::Metrics(text) => (Some("text/plain"), text, true),
            Content::Page(sentence) => (Some("text/html;charset=utf-8"), error_page(status, &sentence), false),
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        if let Some(content_type) = content_type {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
            headers.insert(header::SERVER, policy.server.clone());
        }
        headers.extend(self.headers);
        if extra {
            headers.extend(policy.headers.iter().cloned());
        }
        response
    }
}

fn error_page(status: StatusCode, sentence: &str) -> String {
    let reason = status.canonical_reason().unwrap_or("Error");
    let sentence = sentence.replace('&', "&amp;").replace('<', "&lt;");
    format!("<!DOCTYPE html>\n<html><title>{status}</title><body><h1>{reason}</h1><p>{sentence}</p></body></html>\n")
}

/// Reads a request's body as an object. `optional`: none at all, or an empty one, is an empty object.
pub(crate) async fn read_object(headers: &HeaderMap, body: Body, optional: bool) -> Result<Map<String, Value>, Answer> {
    let length = headers.get(header::CONTENT_LENGTH);
    match length.map(|length| length.to_str().unwrap_or("").trim().parse::<usize>()) {
        None if optional => return Ok(Map::new()),
        None => return Err(Answer::page(411, "the request needs a Content-Length")),
        Some(Err(_)) => return Err(Answer::page(400, "the Content-Length is not a number")),
        Some(Ok(0)) if optional => return Ok(Map::new()),
        Some(Ok(length)) if length > LARGEST_BODY => {
            return Err(Answer::page(413, format!("the body is larger than {LARGEST_BODY} bytes")));
        }
        Some(Ok(_)) => {}
    }
    let bytes = match tokio::time::timeout(BODY_LIMIT, axum::body::to_bytes(body, LARGEST_BODY)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => return Err(Answer::page(400, format!("the body did not arrive: {error}"))),
        Err(_) => return Err(Answer::page(408, "the body did not arrive in time")),
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) if optional || !object.is_empty() => Ok(object),
        Ok(Value::Object(_)) => Err(Answer::page(400, "the object is empty")),
        Ok(_) => Err(Answer::page(400, "the body is JSON, but not an object")),
        Err(error) => Err(Answer::page(400, format!("the body is not JSON: {error}"))),
    }
}
