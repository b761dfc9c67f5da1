//! Members' REST APIs as the operator's commands call them.

use std::time::Duration;

use serde_json::Value;
use trunkline_config::local::Ctl;

use super::error::{CtlError, Result};
use super::select::Node;
use crate::peer::{RestClient, endpoint};

/// What is waited for at most: a restart or a switchover takes as long as the settings allow, and patronictl waits without end.
const ACTION: Duration = Duration::from_secs(3600);

/// The same, for what only looks.
const LOOK: Duration = Duration::from_secs(10);

/// A client with the operator's credentials.
pub(super) struct Rest {
    client: RestClient,
}

/// An API's answer, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// The API did not answer; says which and why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct CallError(String);

impl From<CallError> for CtlError {
    fn from(error: CallError) -> Self {
        Self::new(error.0)
    }
}

/// An HTTP method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Post,
    Patch,
    Delete,
}

impl Rest {
    /// A client with the credentials of the configuration.
    pub fn new(ctl: &Ctl) -> Result<Self> {
        let client = RestClient::for_operator(ctl, false);
        let client = client.map_err(|error| CtlError::new(format!("REST APIs can not be called: {error}")))?;
        Ok(Self { client })
    }

    /// Sends a request to another endpoint of the API whose URL the member tells.
    pub async fn call(
        &self,
        node: &Node,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> std::result::Result<Answer, CallError> {
        let name = &node.name;
        let Some(api_url) = &node.member.api_url else {
            return Err(CallError(format!(
                "Member {name} does not tell its REST API's address (no api_url in its key)"
            )));
        };
        let (method, deadline) = match method {
            Method::Get => ("GET", LOOK),
            Method::Post => ("POST", ACTION),
            Method::Patch => ("PATCH", ACTION),
            Method::Delete => ("DELETE", ACTION),
        };
        match self.client.request(method, &endpoint(api_url, path), body, deadline).await {
            Ok(response) => Ok(Answer { status: response.status, body: response.text }),
            Err(error) => {
                Err(CallError(format!("Can not use the REST API of member {name}: {error}. Is its agent running?")))
            }
        }
    }
}
