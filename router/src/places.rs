//! A bounded number of places, whose bound can change while they are taken.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Places, some of them taken.
#[derive(Debug)]
pub struct Places {
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug)]
struct State {
    taken: usize,
    limit: usize,
}

/// A taken place; dropping it frees it.
#[derive(Debug)]
pub struct Place(Arc<Places>);

impl Places {
    /// `limit` places, all of them free.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { taken: 0, limit }), freed: Notify::new() })
    }

    /// From now on there are `limit` places. Whoever has one keeps it, also if there are too many.
    pub fn resize(&self, limit: usize) {
        self.state.lock().limit = limit;
        self.freed.notify_waiters();
    }

    /// How many there are.
    pub fn limit(&self) -> usize {
        self.state.lock().limit
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.state.lock().taken
    }

    /// A place, if one is free.
    pub fn try_take(self: &Arc<Self>) -> Option<Place> {
        let mut state = self.state.lock();
        (state.taken < state.limit).then(|| {
            state.taken += 1;
            Place(self.clone())
        })
    }

    /// A place, also if there is none.
    pub fn take_anyway(self: &Arc<Self>) -> Place {
        self.state.lock().taken += 1;
        Place(self.clone())
    }

    /// A place, once one is free.
    pub async fn take(self: &Arc<Self>) -> Place {
        loop {
            // Made before the look, so that nothing that is freed in between is missed.
            let freed = self.freed.notified();
            if let Some(place) = self.try_take() {
                return place;
            }
            freed.await;
        }
    }

    /// Returns once none is taken.
    pub async fn empty(&self) {
        loop {
            let freed = self.freed.notified();
            if self.taken() == 0 {
                return;
            }
            freed.await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.state.lock().taken -= 1;
        self.0.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn places_are_bounded_and_the_bound_can_change() {
        let places = Places::new(2);
        let first = places.try_take();
        let second = places.try_take();
        assert!(first.is_some() && second.is_some() && places.try_take().is_none());
        places.resize(1);
        drop(first);
        assert!(places.try_take().is_none(), "one too many was taken");
        places.resize(3);
        assert_eq!((places.taken(), places.limit()), (1, 3));
        let third = places.take().now_or_never();
        assert!(third.is_some());
        assert!(places.empty().now_or_never().is_none());
        drop((second, third));
        assert!(places.empty().now_or_never().is_some());
    }

    #[tokio::test]
    async fn whoever_waits_is_woken() {
        let places = Places::new(1);
        let only = places.try_take();
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                tokio::spawn({
                    let places = places.clone();
                    async move { drop(places.take().await) }
                })
            })
            .collect();
        tokio::task::yield_now().await;
        drop(only);
        for waiting in waiting {
            waiting.await.unwrap();
        }
        assert_eq!(places.taken(), 0);
    }
}
