// Package logging makes the one log of the process: a slog handler to which
// klog (Kubernetes), logrus (containerd), zap (etcd) and the standard library's log are
// bridged, each line with the component it comes from.
//
// An idle, healthy node is nearly silent at the default level. The "info" lines of embedded
// components are mostly progress of their internals and become debug here. Their warnings and
// errors keep their level, except those that are expected: on a healthy node, during a stop,
// and while a server has no leader.
//
// Users can see more of Kubernetes' lines than the level lets through: [Verbose].
//
// The package is not for metrics or events. Only package main calls [Setup], and reports the
// states in which lines are expected. Any package may use the key constants and [Zap], and
// those with Kubernetes' components may use [Verbose].
package logging
