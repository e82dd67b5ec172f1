//! What every process needs: config, telemetry, net, shutdown.
