// Package logging makes the one log of the process: a slog handler to which
// klog (Kubernetes), logrus (containerd), zap (etcd) and the standard library's log are
// bridged, each line with the component it comes from.
//
// An idle, healthy node is nearly silent at the default level: what the
// embedded components call "info" is mostly progress of their own internals and
// becomes debug here; their warnings and errors keep their level, but for those that
// are no news: on a healthy node, during a stop, and while a server has no leader.
//
// Users can have more of Kubernetes' lines shown than the level lets through: [Verbose].
//
// It is not for metrics or events. Only package main calls [Setup], and says what is
// no news; any package may use the key constants and [Zap], and those that hold
// Kubernetes' components [Verbose].
package logging
