"""Running as a service: launchd and systemd, the lock of a server, its log file, and what doctor looks at."""
