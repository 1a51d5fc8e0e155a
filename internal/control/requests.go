package control

import "time"

// Where the running process answers the commands that ask it.
const (
	TokensPath       = "/tokens"
	CreateTokenPath  = "/tokens/create"
	RemoveTokenPath  = "/tokens/remove"
	AllowNodePath    = "/nodes/allow"
	RemoveNodePath   = "/nodes/remove"
	ConnectNodePath  = "/nodes/connect"
	ServersPath      = "/servers"
	RemoveServerPath = "/servers/remove"
	TracePath        = "/net/trace"
	SaveSnapshotPath = "/snapshots/save"
	SaveArchivePath  = "/snapshots/archive"

	RecoveryKeyPath    = "/recovery-key"
	NewRecoveryKeyPath = "/recovery-key/new"

	KubeconfigsPath      = "/kubeconfigs"
	CreateKubeconfigPath = "/kubeconfigs/create"
	RevokeKubeconfigPath = "/kubeconfigs/revoke"

	RotateCertificatesPath = "/certificates/rotate"

	SecretsEncryptionPath       = "/secrets-encryption"
	ChangeSecretsEncryptionPath = "/secrets-encryption/change" // its parameter "change": rotate, enable or disable
)

// Where the key of service accounts' tokens is replaced.
const (
	AccountKeysPath       = "/service-account-keys"
	RotateAccountKeysPath = "/service-account-keys/rotate" // its parameter "publish": for how long before the new key signs
	FinishAccountKeysPath = "/service-account-keys/finish" // its parameter "force": "true" or not
)

// AccountKeys is the answer at AccountKeysPath: the keys of service accounts' tokens, by their IDs ("kid" in tokens).
type AccountKeys struct {
	Foreign    string              `json:"foreign,omitempty"`   // why kedge does not manage them
	Signs      string              `json:"signs"`               // the key that signs, or is to sign
	Old        []string            `json:"old,omitempty"`       // that a change replaces
	Stage      string              `json:"stage,omitempty"`     // of the change; empty if none is carried out
	Waits      string              `json:"waits,omitempty"`     // why the stage is not over
	Began      time.Time           `json:"began,omitzero"`      // of the last change
	Switched   time.Time           `json:"switched,omitzero"`   // since when all servers sign with its key
	FinishFrom time.Time           `json:"finishFrom,omitzero"` // from when on the change can be finished without force
	Ended      time.Time           `json:"ended,omitzero"`      // of the last change
	Secrets    []string            `json:"secrets,omitempty"`   // NAMESPACE/NAME of those with tokens of the old keys
	Servers    []AccountKeysServer `json:"servers"`
}

// AccountKeysServer is what a server has of the keys of service accounts' tokens.
type AccountKeysServer struct {
	Name    string    `json:"name"`
	Keys    []string  `json:"keys"`             // that its API server uses: the first signs
	Current bool      `json:"current"`          // they are those that the present stage wants
	OldUsed time.Time `json:"oldUsed,omitzero"` // when a token of an old key was last shown to it, since its start
	Problem string    `json:"problem,omitempty"`
}

// CreatedToken is the answer at CreateTokenPath.
type CreatedToken struct {
	Token  string `json:"token"` // in full: it is shown this once
	Server string `json:"server"`
}

// CreatedKubeconfig is the answer at CreateKubeconfigPath.
type CreatedKubeconfig struct {
	Certificate string    `json:"certificate"` // of the user, then its authority, in PEM
	Authority   string    `json:"authority"`   // of the API's certificate, in PEM
	Server      string    `json:"server"`      // URL
	ID          string    `json:"id"`
	Ends        time.Time `json:"ends"`
	// Unnamed is why the API's certificate of this server does not fit the URL; empty if it does.
	Unnamed string `json:"unnamed,omitempty"`
}

// ListedServer is a server as the answer at ServersPath has it.
type ListedServer struct {
	Name      string    `json:"name"`
	Addresses []string  `json:"addresses"`
	Role      string    `json:"role"`
	Reachable bool      `json:"reachable"`
	LastSeen  time.Time `json:"lastSeen,omitzero"`
}

// SnapshotFolder is the folder of the datastore's snapshots in the data directory.
const SnapshotFolder = "snapshots"

// SavedArchive is the answer at SaveArchivePath. Its parameters are "name", what the file's name begins with, and "passphrase",
// empty for the recovery key.
type SavedArchive struct {
	Path     string `json:"path"`
	Size     int64  `json:"size"`     // in bytes
	Revision int64  `json:"revision"` // of the datastore
	OpenedBy string `json:"openedBy"`
}

// RecoveryKey is the answer at RecoveryKeyPath and NewRecoveryKeyPath.
type RecoveryKey struct {
	Key     string `json:"key"`
	Earlier string `json:"earlier,omitempty"` // the key that was replaced
}

// SavedSnapshot is the answer at SaveSnapshotPath, whose parameter "name" is the name of the new file in SnapshotFolder.
type SavedSnapshot struct {
	Path     string `json:"path"`     // empty if the datastore is an external etcd
	Size     int64  `json:"size"`     // in bytes
	Revision int64  `json:"revision"` // of the datastore
	Hash     string `json:"hash"`     // SHA-256 of the database in the file
}

// SecretsEncryption is the answer at SecretsEncryptionPath: how Secrets are encrypted in the datastore, and how far a change of
// that is.
type SecretsEncryption struct {
	Foreign   string             `json:"foreign,omitempty"` // why kedge does not manage it; then the fields of providers and changes are empty
	Encrypted bool               `json:"encrypted"`         // new values are
	Provider  string             `json:"provider,omitempty"`
	Key       string             `json:"key,omitempty"`    // the name of the key with which new values are encrypted
	Change    string             `json:"change,omitempty"` // that is carried out, or the last one; empty if there never was one
	Stage     string             `json:"stage,omitempty"`  // of the change; empty if none is carried out
	Waits     string             `json:"waits,omitempty"`  // why the stage is not over
	Began     time.Time          `json:"began,omitzero"`   // of the change
	Ended     time.Time          `json:"ended,omitzero"`   // likewise
	Done      int                `json:"done"`             // Secrets that are written as the change wants it
	Total     int                `json:"total"`            // Secrets
	Servers   []EncryptingServer `json:"servers"`
}

// EncryptingServer is what a server has of the keys of Secrets.
type EncryptingServer struct {
	Name    string   `json:"name"`
	Keys    []string `json:"keys"`    // that its API server uses: the first writes, all read
	Current bool     `json:"current"` // they are those that the present stage wants
	Problem string   `json:"problem,omitempty"`
}
