package joining

import (
	"encoding/json"
	"errors"
	"net/netip"
)

// Paths of the exchange, on the API's port.
const (
	Prefix     = "/kedge/v1/"
	PathCA     = Prefix + "cacert" // GET, answered without authentication: CA
	PathJoin   = Prefix + "join"   // POST Request, with a token: Answer
	PathRenew  = Prefix + "renew"  // POST, over a connection with the node's key: Answer
	PathServer = Prefix + "server" // POST ServerRequest, with a token for servers: ServerAnswer

	PathWitness      = Prefix + "witness"       // POST ServerRequest, with a token for witnesses: WitnessAnswer
	PathRenewWitness = Prefix + "witness/renew" // POST, over a connection with the witness's key: WitnessAnswer
)

// MaxBody bounds the bytes of a request or an answer.
const MaxBody = 64 << 10

// CA is the authority of the API's certificate. It is sent to every client, which trusts it
// only if the token names it.
type CA struct {
	Certificate string `json:"certificate"` // PEM
	// Proofs has a [SlowProof] for each preshared secret, of agents and of servers, and a
	// [Proof] if the secret is random, which older agents understand.
	Proofs []string `json:"proofs,omitempty"`
}

// Request is the request of a machine that joins.
type Request struct {
	TokenID  string `json:"tokenID"`
	Secret   string `json:"secret"`
	NodeName string `json:"nodeName"`
	CSR      string `json:"csr"` // PEM; only its key counts
}

// Answer is the answer to a join and to a renewal. All certificates are for the machine's own
// key and in PEM, with their authority.
type Answer struct {
	Client  string  `json:"client"`   // the kubelet as a client: system:node:NAME
	Network string  `json:"network"`  // the node's data path as a client: system:kedge:network:NAME
	Serving string  `json:"serving"`  // the kubelet as a server
	Clients string  `json:"clientCA"` // the authority of the kubelet's clients
	Cluster Cluster `json:"cluster"`
}

// ServerRequest is the request of a machine that joins as a server or as a witness.
type ServerRequest struct {
	Request
	// Peers are the addresses of this machine's store for the other servers, best first.
	Peers []netip.AddrPort `json:"peers"`
	// External says that this machine uses an external datastore.
	External bool `json:"externalDatastore,omitempty"`
}

// ServerAnswer is the answer to a ServerRequest.
type ServerAnswer struct {
	Cluster Cluster `json:"cluster"`
	// Sealed is a [Credentials] in JSON, which only the machine's key opens.
	Sealed []byte `json:"sealed"`
	// Admission has the data by which the machine's store becomes a member. It is opaque to
	// this package.
	Admission json.RawMessage `json:"admission"`
}

// WitnessAnswer is the answer to a witness's ServerRequest and to its renewal. It has no secret of the cluster.
type WitnessAnswer struct {
	Cluster Cluster `json:"cluster"`
	// Certificate is that of the witness's datastore, for its own key, and Peers is the authority of the datastores' links,
	// both in PEM.
	Certificate string `json:"certificate"`
	Peers       string `json:"peerCA"`
	// Admission is that of a [ServerAnswer]. The answer to a renewal has none.
	Admission json.RawMessage `json:"admission,omitempty"`
}

// Credentials are the secrets that all servers of a cluster share, such as the private keys of
// its authorities. The keys are paths of files, relative to the server's directory, and the
// values their contents.
type Credentials map[string][]byte

// SealPurpose is the purpose for which credentials are sealed.
const SealPurpose = "kedge credentials of a server"

// Problem is the body of an unsuccessful answer.
type Problem struct {
	Error string `json:"error"` // one sentence for the administrator
}

// Cluster has the settings that all nodes of a cluster share. A server takes them from its
// flags, and an agent from a server.
type Cluster struct {
	Servers []string `json:"servers"` // URLs of the API, of all servers

	ClusterCIDRs  []netip.Prefix `json:"clusterCIDRs"` // of pods: one, or one of each family
	ServiceCIDRs  []netip.Prefix `json:"serviceCIDRs"` // of services: likewise
	ClusterDNS    []netip.Addr   `json:"clusterDNS"`
	ClusterDomain string         `json:"clusterDomain"`
	Backend       string         `json:"backend"`           // connection of pods on different nodes, as in --flannel-backend
	Pools         []string       `json:"lbPools,omitempty"` // addresses for load balancers, as in --lb-pool

	// External says that nodes connect by their addresses outside of their networks.
	External bool `json:"flannelExternalIP,omitempty"`

	NoDNS      bool `json:"noDNS,omitempty"`      // names are left to another resolver
	NoBalancer bool `json:"noBalancer,omitempty"` // load balancers are left to another controller
	NoProxy    bool `json:"noProxy,omitempty"`    // services are left to another proxy
	NoPolicy   bool `json:"noPolicy,omitempty"`   // network policies are not enforced
}

// check returns an error if settings are missing without which no machine of the cluster can start.
func (c Cluster) check() error {
	if len(c.ClusterCIDRs) == 0 || len(c.ServiceCIDRs) == 0 || c.ClusterDomain == "" {
		return errors.New("the cluster's settings are incomplete")
	}
	return nil
}
