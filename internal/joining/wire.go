package joining

import (
	"encoding/json"
	"net/netip"
)

// Paths of the exchange, on the API's port.
const (
	Prefix     = "/kedge/v1/"
	PathCA     = Prefix + "cacert" // GET, answered to anybody: CA
	PathJoin   = Prefix + "join"   // POST Request, with a token: Answer
	PathRenew  = Prefix + "renew"  // POST, over a connection with the node's key: Answer
	PathServer = Prefix + "server" // POST ServerRequest, with a token for servers: ServerAnswer
)

// MaxBody is how many bytes a request or an answer may have.
const MaxBody = 64 << 10

// CA is the authority of the API's certificate. Whoever asks is told, and believes
// it only if the token says so.
type CA struct {
	Certificate string `json:"certificate"` // PEM
	// Proofs are one [Proof] for each secret that was fixed in advance: for agents,
	// for servers.
	Proofs []string `json:"proofs,omitempty"`
}

// Request is what a machine asks for when it joins.
type Request struct {
	TokenID  string `json:"tokenID"`
	Secret   string `json:"secret"`
	NodeName string `json:"nodeName"`
	CSR      string `json:"csr"` // PEM; only its key counts
}

// Answer is what a machine gets when it has joined, and at each renewal. All
// certificates are for the machine's own key and in PEM, with their authority.
type Answer struct {
	Client  string  `json:"client"`   // the kubelet as a client: system:node:NAME
	Network string  `json:"network"`  // the node's data path as a client: system:kedge:network:NAME
	Serving string  `json:"serving"`  // the kubelet as a server
	Clients string  `json:"clientCA"` // the authority of those who may call the kubelet
	Cluster Cluster `json:"cluster"`
}

// ServerRequest is what a machine asks for that is to be a server.
type ServerRequest struct {
	Request
	// Peers is where the other servers' stores will find this machine's, best first.
	Peers []netip.AddrPort `json:"peers"`
}

// ServerAnswer is what a server gets when it has joined.
type ServerAnswer struct {
	Cluster Cluster `json:"cluster"`
	// Sealed is a [Credentials] in JSON, which only the machine's key opens.
	Sealed []byte `json:"sealed"`
	// Admission is what the machine's store needs to become a member; joining does
	// not look into it.
	Admission json.RawMessage `json:"admission"`
}

// Credentials are what all servers of a cluster have in common and nobody else may
// have: the private keys of its authorities among them. A file's path, relative to the
// server's directory, leads to its content.
type Credentials map[string][]byte

// SealPurpose is what credentials are sealed for.
const SealPurpose = "kedge credentials of a server"

// Problem is the body of an answer that is none.
type Problem struct {
	Error string `json:"error"` // one sentence for the administrator
}

// Cluster is the settings that all nodes of a cluster share. A server takes them
// from its flags, an agent from a server.
type Cluster struct {
	Servers []string `json:"servers"` // URLs of the API, of all servers

	ClusterCIDRs  []netip.Prefix `json:"clusterCIDRs"` // of pods: one, or one of each family
	ServiceCIDRs  []netip.Prefix `json:"serviceCIDRs"` // of services: likewise
	ClusterDNS    []netip.Addr   `json:"clusterDNS"`
	ClusterDomain string         `json:"clusterDomain"`
	Backend       string         `json:"backend"`           // how pods of different nodes meet, as --flannel-backend has it
	Pools         []string       `json:"lbPools,omitempty"` // addresses for load balancers, as --lb-pool has them

	// External says that nodes meet by the addresses that they have outside of their networks.
	External bool `json:"flannelExternalIP,omitempty"`

	NoDNS      bool `json:"noDNS,omitempty"`      // names are left to another resolver
	NoBalancer bool `json:"noBalancer,omitempty"` // load balancers are left to another controller
	NoProxy    bool `json:"noProxy,omitempty"`    // services are left to another proxy
	NoPolicy   bool `json:"noPolicy,omitempty"`   // network policies are not enforced
}
