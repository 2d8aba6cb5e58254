//! One initialisation of logs and traces for both services.
