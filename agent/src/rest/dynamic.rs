//! `/config`: the dynamic settings, which live in the DCS.

use serde_json::{Map, Value};
use trunkline_common::Clock;
use trunkline_common::dcs::{Dcs, store::Outcome};
use trunkline_config::merge;

use super::answer::Answer;
use super::{Api, Observe};

impl<D: Dcs, P: Observe, C: Clock> Api<D, P, C> {
    /// `GET /config`.
    pub(super) async fn config(&self) -> Answer {
        match self.view().await {
            Ok(view) => match &view.config {
                Some(config) if config.value.is_object() => Answer::json(200, config.value.clone()),
                _ => Answer::page(502, "there is no usable config key"),
            },
            Err(error) => Answer::page(503, error.to_string()),
        }
    }

    /// `PATCH /config`: lays the body over what is there. No write, where nothing changes.
    pub(super) async fn patch_config(&self, body: Map<String, Value>) -> Answer {
        let view = match self.store.read().await {
            Ok(view) => view,
            Err(error) => return Answer::page(503, error.to_string()),
        };
        let Some((Value::Object(mut config), revision)) = view.config.map(|config| (config.value, config.revision))
        else {
            return Answer::page(503, "there is no usable config key to change");
        };
        if merge::patch(&mut config, &body) {
            match self.store.put_config(&Value::Object(config.clone()), Some(revision)).await {
                Ok(Outcome::Done(_)) => {}
                Ok(Outcome::Conflict) => return Answer::page(409, "somebody else changed the settings; try again"),
                Err(error) => return Answer::page(409, error.to_string()),
            }
        }
        self.wake();
        Answer::json(200, config.into())
    }

    /// `PUT /config`: replaces all of it.
    pub(super) async fn put_config(&self, body: Map<String, Value>) -> Answer {
        let view = match self.store.read().await {
            Ok(view) => view,
            Err(error) => return Answer::page(502, error.to_string()),
        };
        let same = view.config.as_ref().and_then(|config| config.value.as_object());
        if same.is_some_and(|config| merge::deep_compare(&body, config)) {
            return Answer::json(200, body.into());
        }
        match self.store.put_config(&Value::Object(body.clone()), None).await {
            Ok(_) => Answer::json(200, body.into()),
            Err(error) => Answer::page(502, error.to_string()),
        }
    }
}
