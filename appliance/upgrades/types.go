package upgrades

import (
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Group is the API group of kedge's own kinds.
const Group = "kedge.io"

// Resource is that of the kind.
var Resource = schema.GroupVersionResource{Group: Group, Version: "v1", Resource: "upgrades"}

var kind = Resource.GroupVersion().WithKind("Upgrade")

// Upgrade is an object of kind Upgrade. definition.yaml describes its fields for users.
type Upgrade struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   Spec   `json:"spec"`
	Status Status `json:"status,omitzero"`
}

// Spec is what a user wants. Exactly one of Version, Channel and URL is set.
type Spec struct {
	Version string `json:"version,omitempty"`
	Channel string `json:"channel,omitempty"`
	URL     string `json:"url,omitempty"` // of the folder of a release

	Parallel int     `json:"parallel,omitempty"` // agents at a time; 0 for 1
	Drain    bool    `json:"drain,omitempty"`
	Window   *Window `json:"window,omitempty"` // nil for any time

	Observe metav1.Duration `json:"observe,omitzero"` // 0 for the usual time
	Wait    metav1.Duration `json:"wait,omitzero"`    // 0 for the usual time
}

// Phase is how far an upgrade is.
type Phase string

// The phases.
const (
	Waiting   Phase = "Waiting"
	Running   Phase = "Running"
	Succeeded Phase = "Succeeded"
	Failed    Phase = "Failed"
)

// Status is what was done.
type Status struct {
	ObservedGeneration int64        `json:"observedGeneration,omitempty"` // of the spec that the rest is about
	Phase              Phase        `json:"phase,omitempty"`
	Message            string       `json:"message,omitempty"`
	Version            string       `json:"version,omitempty"` // of the release; it stays when a channel moves on
	StartTime          *metav1.Time `json:"startTime,omitempty"`
	CompletionTime     *metav1.Time `json:"completionTime,omitempty"`
	Nodes              []NodeStatus `json:"nodes,omitempty"`
}

// NodePhase is how far the upgrade of a node is.
type NodePhase string

// The phases of a node.
const (
	NodePending   NodePhase = "Pending"
	NodeUpgrading NodePhase = "Upgrading"
	NodeUpgraded  NodePhase = "Upgraded"
	NodeWentBack  NodePhase = "WentBack"
	NodeFailed    NodePhase = "Failed"
)

// NodeStatus is what was done with a node.
type NodeStatus struct {
	Name    string    `json:"name"`
	Phase   NodePhase `json:"phase"`
	Message string    `json:"message,omitempty"`
	// Cordoned says that the upgrade has cordoned the node, and has to uncordon it.
	Cordoned bool `json:"cordoned,omitempty"`
	// LastUpgrade is the last upgrade of the node before this one: a later one is this one. Clocks of nodes can differ, so no
	// times are compared.
	LastUpgrade string `json:"lastUpgrade,omitempty"`
}

// ended reports whether nothing is left to do. A change of the spec makes a new upgrade of it.
func (u *Upgrade) ended() bool {
	return u.Status.ObservedGeneration == u.Generation && (u.Status.Phase == Succeeded || u.Status.Phase == Failed)
}

// node returns the status of a node, which is added if it is not there.
func (s *Status) node(name string) *NodeStatus {
	i := slices.IndexFunc(s.Nodes, func(n NodeStatus) bool { return n.Name == name })
	if i < 0 {
		i = len(s.Nodes)
		s.Nodes = append(s.Nodes, NodeStatus{Name: name, Phase: NodePending})
	}
	return &s.Nodes[i]
}

// has reports whether a node is in a phase.
func (s *Status) has(phase NodePhase) bool {
	return slices.ContainsFunc(s.Nodes, func(n NodeStatus) bool { return n.Phase == phase })
}

// count returns how many nodes are in a phase.
func (s *Status) count(phase NodePhase) (n int) {
	for _, node := range s.Nodes {
		if node.Phase == phase {
			n++
		}
	}
	return n
}

func now() *metav1.Time { return &metav1.Time{Time: time.Now().Truncate(time.Second)} }
