//! What is told to the supervisor that started the service (systemd, `Type=notify`): that it is up, that it stops. Where
//! there is none nothing happens.

use sd_notify::NotifyState;

/// The service answers: whatever is ordered after it may start.
pub fn ready() {
    tell(&NotifyState::Ready);
}

/// The service has begun to stop.
pub fn stopping() {
    tell(&NotifyState::Stopping);
}

fn tell(state: &NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        tracing::warn!(%error, ?state, "the supervisor (NOTIFY_SOCKET) can't be told");
    }
}
