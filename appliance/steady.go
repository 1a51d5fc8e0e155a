package appliance

import (
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// container is a container that an upgrade must not restart.
type container struct {
	Pod string `json:"pod"` // namespace/name
	UID string `json:"uid"`
	// Name is the container's in the pod.
	Name string `json:"name"`
	ID   string `json:"id"` // another start of the container has another one
}

// restless is how long a container must have run without a restart before its next restart is blamed on an upgrade.
const restless = 10 * time.Minute

// steady returns the running containers that have no recent restart of their own.
func steady(pods []corev1.Pod, now time.Time) (list []container) {
	for _, p := range pods {
		if p.DeletionTimestamp != nil {
			continue
		}
		for _, s := range p.Status.ContainerStatuses {
			last := s.LastTerminationState.Terminated
			if s.State.Running == nil || last != nil && now.Sub(last.FinishedAt.Time) < restless {
				continue
			}
			list = append(list, container{Pod: p.Namespace + "/" + p.Name, UID: string(p.UID), Name: s.Name, ID: s.ContainerID})
		}
	}
	return list
}

// restarted returns an error that names a container of before that was started again. A pod that was deleted meanwhile, and a
// container that has completed, are no fault of an upgrade.
func restarted(before []container, pods []corev1.Pod) error {
	for _, c := range before {
		i := slices.IndexFunc(pods, func(p corev1.Pod) bool { return string(p.UID) == c.UID })
		if i < 0 || pods[i].DeletionTimestamp != nil {
			continue
		}
		for _, s := range pods[i].Status.ContainerStatuses {
			if s.Name == c.Name && s.ContainerID != c.ID && s.ContainerID != "" {
				return fmt.Errorf("the container %s of pod %s was restarted", c.Name, c.Pod)
			}
		}
	}
	return nil
}
