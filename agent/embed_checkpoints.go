package agent

import (
	"encoding/json"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"
	allocation "k8s.io/kubernetes/pkg/kubelet/allocation/state"
	"k8s.io/kubernetes/pkg/kubelet/cm/containermap"
	cpu "k8s.io/kubernetes/pkg/kubelet/cm/cpumanager/state"
	dra "k8s.io/kubernetes/pkg/kubelet/cm/dra/state"
	memory "k8s.io/kubernetes/pkg/kubelet/cm/memorymanager/state"

	"kedge/agent/checkpoints"
)

// stateFiles are the state files whose damage would end the kubelet. Upstream's own code reads them, as it does
// when the kubelet starts.
func stateFiles() []checkpoints.File {
	log := klog.Background()
	pods := func(dir, name string) error {
		_, err := allocation.NewStateCheckpoint(log, dir, name)
		return err
	}
	return []checkpoints.File{
		{Name: "cpu_manager_state", Lost: "the assignment of exclusive CPUs to containers", Check: func(dir, name string) error {
			policy, err := policyOf(dir, name)
			if err == nil {
				_, err = cpu.NewCheckpointState(log, dir, name, policy, containermap.NewContainerMap())
			}
			return err
		}},
		{Name: "memory_manager_state", Lost: "the assignment of reserved memory to containers", Check: func(dir, name string) error {
			policy, err := policyOf(dir, name)
			if err == nil {
				_, err = memory.NewCheckpointState(log, dir, name, policy)
			}
			return err
		}},
		{Name: "allocated_pods_state", Lost: "pod resources that were resized in place", Check: pods},
		{Name: "actuated_pods_state", Lost: "pod resources that were resized in place", Check: pods},
		{Name: "dra_manager_state", Lost: "the prepared devices of resource claims", Check: func(dir, name string) error {
			c, err := dra.NewCheckpointer(dir, name)
			if err != nil {
				return err
			}
			checkpoint, err := c.GetOrCreate()
			if err != nil {
				return err
			}
			_, err = checkpoint.GetClaimInfoStateList()
			return err
		}},
	}
}

// policyOf returns the policy recorded in a state file. A policy other than the configured policy is not
// damage: the user has changed it, and the kubelet reports that.
func policyOf(dir, name string) (string, error) {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return "", err
	}
	var state, inner struct {
		PolicyName string `json:"policyName"`
		Data       string `json:"data"`
	}
	if err := json.Unmarshal(text, &state); err != nil {
		return "", err
	}
	if state.Data != "" && json.Unmarshal([]byte(state.Data), &inner) == nil {
		return inner.PolicyName, nil // the outer policy name is for older kubelets
	}
	return state.PolicyName, nil
}
